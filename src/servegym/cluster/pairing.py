"""Who moves from one replica to another at a tick: what may, and what a rule chooses."""

from __future__ import annotations

import math

from servegym.cluster.jit import helper, inlined
from servegym.cluster.router import kv_need
from servegym.cluster.running import blocks_for_steps
from servegym.cluster.state import (
    BY_FREENESS,
    BY_QUEUES,
    DECODE,
    FIRST_WAITING,
    FIRST_WAITING_OR_SHORTEST,
    LAST,
    LONGEST,
    OBSERVED_KV_CAPACITY,
    OBSERVED_UP,
    QUEUED,
    RUNNING,
    Params,
    State,
)
from servegym.cluster.stretches import steps_ended_by

#: What a rule chooses when nobody moves any more.
NO_MOVE = -1


@inlined
def free_per_request(free: float, demand: float, running: float, waiting: float) -> float:
    """Llumnix's freeness: what is free, less what the head of the queue needs, per request.

    Args:
        free: KV memory that no request holds.
        demand: What the head of the queue needs.
        running: Requests that run.
        waiting: Requests that wait; all together count as one.

    Returns:
        In the unit of `free`; infinite if there is no request.
    """
    count = running
    if waiting > 0.0:
        free -= demand
        count += 1.0
    return free / count if count > 0.0 else math.inf


@inlined
def steps_since(p: Params, s: State, e: int, r: int, now_s: float) -> int:
    """Steps of a decode stretch in progress that have ended and are not booked yet."""
    v = s.replica[e, r]
    if v.mode != DECODE or v.stretch_steps == 1:
        return 0
    return steps_ended_by(p, s, e, r, now_s)


@helper
def freeness(p: Params, s: State, e: int, r: int) -> float:
    """Free blocks of a replica per request now; requests whose KV comes or has landed run."""
    v = s.replica[e, r]
    free = v.free_blocks
    ended = steps_since(p, s, e, r, s.env[e].now_s)
    if ended > 0:
        free -= blocks_for_steps(p, s, e, r, v.iteration + 1, ended)
    demand = 0
    if v.num_waiting > 0:
        q = s.request[e, v.wait_head]
        demand = (q.prompt + q.generated + p.block_size - 1) // p.block_size
    running = v.num_running + s.link[e, r].num_remote
    return free_per_request(float(free), float(demand), float(running), float(v.num_waiting))


@inlined
def is_up(s: State, e: int, r: int) -> bool:
    """Whether a replica is up."""
    return bool(s.observation[e, OBSERVED_UP, r] > 0.0)


@inlined
def may_leave(s: State, e: int, request: int) -> bool:
    """Whether a request may move away from where it is: it waits or decodes, and has its turn."""
    q = s.request[e, request]
    if q.status != QUEUED and (q.status != RUNNING or q.join_iter < 0):
        return False
    m = s.move[e, q.replica]
    return bool(m.request < 0 and m.paired == 0)


@inlined
def may_come(s: State, e: int, r: int, request: int) -> bool:
    """Whether a request may move to a replica."""
    fits = kv_need(s, e, request) <= s.observation[e, OBSERVED_KV_CAPACITY, r]
    return is_up(s, e, r) and bool(fits)


@helper
def may_migrate(s: State, e: int, answer: int) -> bool:
    """Whether an answer, a request times the replica columns plus a replica, may be given."""
    width = s.replica.shape[1]
    request, r = answer // width, answer % width
    if answer < 0 or request >= s.env[e].num_requests or r >= s.env[e].num_replicas:
        return False
    return (
        may_leave(s, e, request)
        and s.request[e, request].replica != r
        and may_come(s, e, r, request)
    )


@helper
def may_anybody_move(p: Params, s: State, e: int, short: bool) -> bool:
    """Whether any request may move; if `short` away from a replica that is short of memory."""
    for a in range(s.env[e].num_replicas):
        v, m = s.replica[e, a], s.move[e, a]
        if m.request >= 0 or m.paired > 0 or not is_up(s, e, a):
            continue
        if short and not _is_short(p, s, e, a):
            continue
        for first in (v.wait_head, v.run_head):
            request = first
            while request >= 0:
                if may_leave(s, e, request):
                    for b in range(s.env[e].num_replicas):
                        if b != a and may_come(s, e, b, request):
                            return True
                request = s.request[e, request].next_request
    return False


@inlined
def _is_short(p: Params, s: State, e: int, r: int) -> bool:
    """Whether a replica lacks memory, or has a long queue, by the measure of the rule."""
    if p.migration.rule == BY_QUEUES:
        return bool(s.replica[e, r].num_waiting >= p.migration.queue_gap)
    return bool(s.move[e, r].lately > 0 or freeness(p, s, e, r) < p.migration.source_below)


@helper
def choose_move(p: Params, s: State, e: int) -> int:
    """Say who moves next at this tick, by the rule of the cluster; `NO_MOVE`: nobody."""
    if p.migration.rule == BY_FREENESS:
        return _by_freeness(p, s, e)
    if p.migration.rule == BY_QUEUES:
        return _by_queues(p, s, e)
    return NO_MOVE


@helper
def _by_freeness(p: Params, s: State, e: int) -> int:
    """Llumnix: the least free replica with the freest, then the second ones, and so on."""
    while True:
        source, target, least, most = -1, -1, 0.0, 0.0
        for r in range(s.env[e].num_replicas):
            m = s.move[e, r]
            if not is_up(s, e, r) or m.paired > 0 or m.request >= 0:
                continue
            value = freeness(p, s, e, r)
            if (value < p.migration.source_below or m.lately > 0) and (source < 0 or value < least):
                source, least = r, value
        if source < 0:
            return NO_MOVE
        for r in range(s.env[e].num_replicas):
            m = s.move[e, r]
            if r == source or not is_up(s, e, r) or m.paired > 0 or m.lately > 0:
                continue
            value = freeness(p, s, e, r)
            if value > p.migration.target_above and (target < 0 or value > most):
                target, most = r, value
        if target < 0:
            return NO_MOVE
        s.move[e, source].paired = 1
        request = victim(p, s, e, source, target)
        if request >= 0:
            s.move[e, target].paired = 1
            return request * s.replica.shape[1] + target


@helper
def victim(p: Params, s: State, e: int, source: int, target: int) -> int:
    """Whom one replica gives to another by the rule of the cluster, -1: nobody."""
    v = s.replica[e, source]
    preferred = p.migration.victim
    if p.migration.rule == BY_QUEUES:
        last = v.wait_tail
        return int(last) if last >= 0 and may_come(s, e, target, last) else -1
    if preferred in (FIRST_WAITING, FIRST_WAITING_OR_SHORTEST):
        if v.num_waiting > 0 and may_come(s, e, target, v.wait_head):
            return int(v.wait_head)
        if preferred == FIRST_WAITING:
            return -1
    found, best = -1, 0
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        if q.join_iter >= 0 and may_come(s, e, target, request):
            tokens = q.prompt + q.generated - q.join_iter  # beyond what is the same for all
            if (
                found < 0
                or preferred == LAST
                or (preferred == LONGEST and tokens > best)
                or (preferred != LONGEST and tokens < best)
            ):
                found, best = request, tokens
        request = q.next_request
    return found


@helper
def _by_queues(p: Params, s: State, e: int) -> int:
    """The longest queue gives its last request to the least busy replica, if that has so many less.

    Of equal ones the first.
    """
    while True:
        source, target, longest, least = -1, -1, 0, 0
        for r in range(s.env[e].num_replicas):
            m, waiting = s.move[e, r], s.replica[e, r].num_waiting
            if is_up(s, e, r) and m.paired == 0 and m.request < 0:
                if source < 0 or waiting > longest:
                    source, longest = r, waiting
        for r in range(s.env[e].num_replicas):
            v = s.replica[e, r]
            busy = v.num_running + 4 * (v.num_waiting + s.link[e, r].num_remote)
            if r != source and is_up(s, e, r) and s.move[e, r].paired == 0:
                if target < 0 or busy < least:
                    target, least = r, busy
        if source < 0 or target < 0:
            return NO_MOVE
        if longest - s.replica[e, target].num_waiting < p.migration.queue_gap:
            return NO_MOVE
        s.move[e, source].paired = 1
        request = victim(p, s, e, source, target)
        if request >= 0:
            s.move[e, target].paired = 1
            return int(request * s.replica.shape[1] + target)
