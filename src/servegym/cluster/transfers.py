"""Requests that are prefilled on one replica and decode on another: docs/disaggregation.md.

Such a request is in one of these places, and holds blocks there and elsewhere as said:

- in the queue of where it will decode, prefilled (`source` holds its blocks) or not (`prefill_on`
  is where that will be done, once blocks have been set aside);
- `RESERVED`, until the timers of this instant go off, and then in the queue or the running list of
  a replica that prefills it, while `target` has set blocks aside;
- `UNPLACED`, with a timer: where it decodes is still to be chosen, `source` may hold its blocks;
- in the list of remote requests of where it will decode, `TRANSFERRING` with a timer until its KV
  has landed (both ends hold blocks), then `LANDED` until it is admitted.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.blocks import hold_matched
from servegym.cluster.entry import (
    ADMIT_APART,
    FIND_PLACE,
    GO_OFF_TRANSFER,
    HAND_OVER,
    PLACE_ON,
    SET_ASIDE,
    STOP_TRANSFERS,
    entry,
)
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.remote import (
    admit_landed,
    are_enough,
    book,
    book_landed,
    clear_links,
    join_remote,
    land,
    leave_remote,
    look_again,
    release_at,
    release_source,
    take_ahead,
)
from servegym.cluster.retention import is_retained, let_go
from servegym.cluster.router import (
    count_outstanding,
    enqueue,
    forget_outstanding,
    forget_prefill,
    kv_need,
    take_back,
)
from servegym.cluster.running import (
    admit_head,
    at_hand,
    leave_waiting,
    unlink_running,
)
from servegym.cluster.state import (
    ALWAYS,
    EV_PLACE,
    EV_PREFILLED,
    EV_TRANSFER,
    JOINING,
    LANDED,
    LANDING,
    LEASE,
    NEVER,
    OBSERVED_KV_CAPACITY,
    OBSERVED_UP,
    PLACE,
    PLACING,
    PREFILL_ONLY,
    QUEUED,
    RESERVED,
    RUNNING,
    TRANSFERRING,
    UNPLACED,
    Params,
    State,
)
from servegym.cluster.steptime import prefill_s
from servegym.cluster.stretches import catch_up
from servegym.cluster.tiers import store_text
from servegym.cluster.timers import remove_timer, set_turn


@inlined
def is_prefilled_elsewhere(s: State, e: int, request: int) -> bool:
    """Whether a request waits here for its KV, which is or will be computed elsewhere."""
    t = s.transfer[e, request]
    return t.source >= 0 or t.prefill_on >= 0


@entry(HAND_OVER, types.void, types.int64, types.int64, types.int64, types.float64)
def hand_over(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """A replica that only prefills has done so: the request leaves it, its blocks stay."""
    q, t = s.request[e, request], s.transfer[e, request]
    unlink_running(s, e, r, request)
    s.replica[e, r].emitted -= q.generated
    forget_prefill(s, e, r, request)
    forget_outstanding(s, e, r, request)
    if p.tiered:
        store_text(p, s, e, r, request, now_s)
    q.hit_hint = q.prompt  # nothing of its prompt is left to compute
    t.source = r
    t.source_slot = q.seq_slot
    t.source_blocks = q.table_len
    q.table_len = 0
    s.link[e, r].num_holding += 1
    t.prefilled_s = now_s
    t.prefill_replica = r
    t.lease_until_s = now_s + p.lease_s
    log_event(p, s, e, now_s, EV_PREFILLED, request, r, 0.0)
    if t.target < 0:
        _unplace(s, e, request, now_s)
        return
    target = t.target
    t.target = -1
    q.seq_slot = t.target_slot
    q.table_len = t.target_blocks
    _begin(p, s, e, request, target, now_s)


@inlined
def _unplace(s: State, e: int, request: int, now_s: float) -> None:
    """Let the place where a request decodes be chosen when engines have had their turns."""
    s.request[e, request].status = UNPLACED
    set_turn(s, e, now_s, PLACING, request)


@entry(FIND_PLACE, types.void, types.int64, types.int64)
def find_place(p: Params, s: State, e: int, request: int) -> None:
    """Choose where a request decodes, ask, or try again later if no replica is up."""
    env, t = s.env[e], s.transfer[e, request]
    now_s = env.now_s
    if t.source >= 0 and now_s >= t.lease_until_s:
        _expire(p, s, e, request, now_s)
        return
    need = kv_need(s, e, request)
    count, best, least = 0, -1, 0
    for r in range(env.num_replicas):
        v = s.replica[e, r]
        allowed = (
            p.role[v.type_idx] != PREFILL_ONLY
            and s.observation[e, OBSERVED_UP, r] > 0.0
            and need <= s.observation[e, OBSERVED_KV_CAPACITY, r]
        )
        s.allowed[e, r] = allowed
        count += allowed
        busy = v.num_running + 4 * (v.num_waiting + s.link[e, r].num_remote)
        if allowed and (best < 0 or busy < least):
            best, least = r, busy
    width = s.replica.shape[1]
    s.allowed[e, width] = False
    s.allowed[e, width + 1] = False
    env.allowed_above = math.inf  # `allowed` holds for no dispatch
    if count == 0:
        s.request[e, request].status = UNPLACED
        again_s = now_s + p.hold_s
        if t.source >= 0:
            again_s = min(again_s, t.lease_until_s)
        set_turn(s, e, again_s, PLACING, request)
    elif p.asks.place == ALWAYS or (p.asks.place != NEVER and count > 1):
        env.decision = PLACE
        env.deciding = request
        return
    else:
        place(p, s, e, request, best)
    s.allowed[e, width] = p.allow_hold
    s.allowed[e, width + 1] = p.allow_reject


@entry(PLACE_ON, types.void, types.int64, types.int64, types.int64)
def place(p: Params, s: State, e: int, request: int, r: int) -> None:
    """Put a request at the end of the queue of where it will decode."""
    env, q, t = s.env[e], s.request[e, request], s.transfer[e, request]
    width = s.replica.shape[1]
    s.allowed[e, width] = p.allow_hold
    s.allowed[e, width + 1] = p.allow_reject
    q.status = QUEUED
    q.replica = r
    log_event(p, s, e, env.now_s, EV_PLACE, request, r, 0.0)
    count_outstanding(s, e, r, request)
    s.replica[e, r].last_dispatch_s = env.now_s
    if t.source >= 0:
        set_turn(s, e, t.lease_until_s, LEASE, request)
    enqueue(p, s, e, r, request)


@entry(SET_ASIDE, types.int64, types.int64, types.int64, types.float64)
def set_aside(p: Params, s: State, e: int, r: int, now_s: float) -> int:
    """Set blocks aside for the whole text of the head of the queue, whose KV will come.

    Returns:
        0 if there are too few.
    """
    v, k = s.replica[e, r], s.link[e, r]
    request = v.wait_head
    q, t = s.request[e, request], s.transfer[e, request]
    size = p.block_size
    total = q.prompt + q.generated
    hits, unheld, _ = at_hand(p, s, e, r, request)
    blocks = (total + size - 1) // size
    ahead = 0
    if t.source < 0:
        ahead = (p.ahead_tokens * (v.num_running + k.num_holding) + size - 1) // size
    if blocks - hits + unheld + ahead > v.free_blocks:
        return 0
    leave_waiting(s, e, r, request)
    v.emitted -= q.generated
    hold_matched(p, s, e, r, request, hits)
    if p.retains and is_retained(s, e, r, q.after):
        let_go(p, s, e, r, q.after)
    q.table_len = blocks
    take_ahead(p, s, e, r, q.seq_slot, hits, blocks)
    k.num_holding += 1
    t.hits = hits
    if t.source >= 0:
        remove_timer(s, e, q.timer_pos)
        _begin(p, s, e, request, r, now_s)
        return 1
    t.target = r
    t.target_slot = q.seq_slot
    t.target_blocks = blocks
    q.table_len = 0
    q.status = RESERVED
    set_turn(s, e, now_s, JOINING, request)
    return 1


@inlined
def _begin(p: Params, s: State, e: int, request: int, r: int, now_s: float) -> None:
    """Begin to move the KV of a request, which holds blocks at both ends, to replica `r`."""
    q, t = s.request[e, request], s.transfer[e, request]
    blocks = (q.prompt + q.generated + p.block_size - 1) // p.block_size - t.hits
    landing_s = book(p, s, e, request, t.source, r, blocks, now_s)
    join_remote(s, e, r, request)
    set_turn(s, e, landing_s, LANDING, request)
    log_event(p, s, e, now_s, EV_TRANSFER, request, r, t.num_bytes)


@inlined
def _arrive(p: Params, s: State, e: int, request: int, now_s: float) -> None:
    """The KV of a request has come: it can be admitted, and its source is free of it."""
    book_landed(p, s, e, request, s.transfer[e, request].source, s.request[e, request].replica)
    land(p, s, e, request, now_s)


@entry(ADMIT_APART, types.float64, *[types.int64] * 2, types.float64, types.int64, types.float64)
def admit_apart(
    p: Params, s: State, e: int, r: int, now_s: float, budget: int, attention_s: float
) -> float:
    """Admit what has landed, then waiting requests, or set blocks aside for them.

    Args:
        p: Constants.
        s: State; the tokens left will be in `s.link[e, r].budget`.
        e: Environment.
        r: Replica.
        now_s: Time, seconds.
        budget: Tokens left of the step that forms.
        attention_s: Of its prefills.

    Returns:
        Those seconds, of the admitted ones included.
    """
    v, k = s.replica[e, r], s.link[e, r]
    t = v.type_idx
    size = p.block_size
    running = v.num_running
    if k.num_landed > 0:
        attention_s = admit_landed(p, s, e, r, budget, attention_s)
    budget -= v.num_running - running
    while budget > 0 and v.num_waiting > 0 and v.num_running < p.max_num_seqs[t]:
        if are_enough(p, s, e, r):
            break
        request = v.wait_head
        if is_prefilled_elsewhere(s, e, request):
            if set_aside(p, s, e, r, now_s) == 0:
                break
            continue
        q = s.request[e, request]
        total = q.prompt + q.generated
        hits, unheld, computed = at_hand(p, s, e, r, request)
        take = min(total - computed, budget)
        if not p.chunked_prefill and take < total - computed:
            break
        if (total + size - 1) // size - hits + unheld > v.free_blocks:
            break
        admit_head(p, s, e, r, now_s, hits, computed, take)
        budget -= take
        attention_s += prefill_s(p, t, take, computed)
    k.budget = budget
    return attention_s


@entry(GO_OFF_TRANSFER, types.void, types.int64, types.int64, types.int64)
def go_off_transfer(p: Params, s: State, e: int, kind: int, request: int) -> None:
    """Do what a timer of a request on its way was set for."""
    now_s = s.env[e].now_s
    if kind == LANDING:
        _arrive(p, s, e, request, now_s)
    elif kind == LEASE:
        _expire(p, s, e, request, now_s)
    elif kind == PLACING:
        find_place(p, s, e, request)
    else:
        q, t = s.request[e, request], s.transfer[e, request]
        q.status = QUEUED
        q.replica = t.prefill_on
        t.prefill_on = -1
        enqueue(p, s, e, q.replica, request)


@helper
def _expire(p: Params, s: State, e: int, request: int, now_s: float) -> None:
    """Nobody has fetched prefilled KV in time: it is given up, and the request dispatched anew."""
    source = s.transfer[e, request].source
    release_source(p, s, e, request, now_s, now_s)
    _drop(p, s, e, request, source, now_s, now_s)


@helper
def _drop(
    p: Params, s: State, e: int, request: int, r: int, now_s: float, ended_by_s: float
) -> None:
    """Take a request whose prefill on replica `r` is lost out of where it is, back to the router.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        request: The one.
        r: Replica.
        now_s: Time, seconds.
        ended_by_s: Steps that end later are still in progress.
    """
    q, t = s.request[e, request], s.transfer[e, request]
    if q.timer_pos >= 0:
        remove_timer(s, e, q.timer_pos)
    there = q.replica
    if q.status == QUEUED:
        leave_waiting(s, e, there, request)
        s.replica[e, there].emitted -= q.generated
        forget_outstanding(s, e, there, request)
        look_again(p, s, e, there, now_s, ended_by_s)
    elif q.status == TRANSFERRING:
        leave_remote(s, e, there, request)
        s.replica[e, there].emitted -= q.generated
        forget_outstanding(s, e, there, request)
        catch_up(p, s, e, there, ended_by_s)
        release_at(p, s, e, request, there, q.seq_slot, q.table_len)
        look_again(p, s, e, there, now_s, ended_by_s)
    give_up_target(p, s, e, request, now_s, ended_by_s)
    t.prefill_on = -1
    t.lease_until_s = math.inf
    take_back(p, s, e, r, request, now_s)


@helper
def give_up_target(
    p: Params, s: State, e: int, request: int, now_s: float, ended_by_s: float
) -> None:
    """Give back what was set aside, if anything, for a request that will not be prefilled."""
    t = s.transfer[e, request]
    target = t.target
    if target >= 0:
        t.target = -1
        forget_outstanding(s, e, target, request)
        catch_up(p, s, e, target, ended_by_s)
        release_at(p, s, e, request, target, t.target_slot, t.target_blocks)
        look_again(p, s, e, target, now_s, ended_by_s)


@entry(STOP_TRANSFERS, types.void, types.int64, types.int64, types.float64)
def stop_transfers(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """A replica fails: what was prefilled there is lost, what was to decode there is placed anew.

    Its own blocks and links, its queue and its lists are cleared by whoever calls.
    """
    ended_by_s = np.nextafter(now_s, -math.inf)  # faults come before the steps that end now
    for i in range(s.env[e].num_requests):
        q, t = s.request[e, i], s.transfer[e, i]
        status = q.status
        if status != QUEUED and status != RUNNING and status < UNPLACED:
            continue
        if t.source == r:
            t.source = -1
            _drop(p, s, e, i, r, now_s, ended_by_s)
        elif t.prefill_on == r:
            forget_prefill(s, e, r, i)
            forget_outstanding(s, e, r, i)
            _drop(p, s, e, i, r, now_s, ended_by_s)
        elif t.target == r:
            t.target = -1
            forget_outstanding(s, e, r, i)
        elif q.replica == r:
            if status == LANDED:
                forget_outstanding(s, e, r, i)
                take_back(p, s, e, r, i, now_s)
            elif status == TRANSFERRING or (status == QUEUED and is_prefilled_elsewhere(s, e, i)):
                if status == QUEUED:
                    leave_waiting(s, e, r, i)
                if q.timer_pos >= 0:
                    remove_timer(s, e, q.timer_pos)
                forget_outstanding(s, e, r, i)
                q.table_len = 0
                _unplace(s, e, i, now_s)
            elif status != UNPLACED and status != RESERVED:
                give_up_target(p, s, e, i, now_s, ended_by_s)


@inlined
def reset_transfers(s: State, e: int) -> None:
    """Put requests and links of one environment into their initial state."""
    for i in range(s.env[e].num_requests):
        t = s.transfer[e, i]
        t.source = -1
        t.prefill_on = -1
        t.target = -1
        t.hits = 0
        t.num_bytes = 0.0
        t.lease_until_s = math.inf
        t.prefilled_s = math.nan
        t.begin_s = math.nan
        t.landed_s = math.nan
        t.prefill_replica = -1
        t.moved_bytes = 0.0
        t.num_migrations = 0
        t.num_stays = 0
        t.paused_s = 0.0
    for r in range(s.env[e].num_replicas):
        clear_links(s, e, r)
        s.link[e, r].out_bytes = 0.0
        s.link[e, r].in_bytes = 0.0
