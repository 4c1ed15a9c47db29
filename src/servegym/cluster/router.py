"""What a router counts by itself, and requests that come to a replica or back from it."""

from __future__ import annotations

import math

from numba import types

from servegym.cluster.blocks import count_hits
from servegym.cluster.entry import PREFIX_HIT_TOKENS, SEE_PREFIXES, entry
from servegym.cluster.jit import inlined
from servegym.cluster.log import log_event
from servegym.cluster.retention import expect
from servegym.cluster.state import (
    EV_RETURN,
    OBSERVED_OUTSTANDING,
    OBSERVED_OUTSTANDING_PREDICTED,
    OBSERVED_OUTSTANDING_PROMPT,
    OBSERVED_PENDING_PREFILL,
    OBSERVED_PREFIX_HIT,
    OBSERVED_UP,
    RETURN,
    RETURNED,
    Params,
    State,
)
from servegym.cluster.stretches import catch_up, wake
from servegym.cluster.timers import set_turn


@inlined
def kv_need(s: State, e: int, request: int) -> int:
    """KV tokens a request holds at its end."""
    q = s.request[e, request]
    return q.prompt + q.output - 1


@entry(PREFIX_HIT_TOKENS, types.int64, *[types.int64] * 3, types.float64)
def prefix_hit_tokens(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> int:
    """Leading prompt tokens of a request in a replica's cache; its last token never counts."""
    if not p.prefix_caching:
        return 0
    catch_up(p, s, e, r, now_s)
    size = p.block_size
    return size * count_hits(p, s, e, r, request, (s.request[e, request].prompt - 1) // size)


@entry(SEE_PREFIXES, types.void, types.int64, types.int64, types.float64)
def see_prefixes(p: Params, s: State, e: int, request: int, now_s: float) -> None:
    """Write `prefix_hit_tokens` of all replicas that are up into the observation, 0 for others.

    The blocks of the prompt are gone through once, with the replicas that have all so far.
    """
    rows, q = s.observation[e], s.request[e, request]
    num_replicas, stop = s.env[e].num_replicas, (q.prompt - 1) // p.block_size
    for r in range(num_replicas):
        rows[OBSERVED_PREFIX_HIT, r] = 0.0
        if rows[OBSERVED_UP, r] > 0.0:
            catch_up(p, s, e, r, now_s)
    for word in range(s.cached_on.shape[2]):
        first = word << 6
        end = min(num_replicas, first + 64)
        having = 0
        for r in range(first, end):
            if rows[OBSERVED_UP, r] > 0.0:
                having |= 1 << (r - first)
        j = 0
        for seg in range(q.segment_first, q.segment_stop):
            first_name = s.segment[e, seg].first_name
            segment_end = min(stop, s.segment[e, seg].end // p.block_size)
            while j < segment_end and having != 0:
                lost = having & ~s.cached_on[e, first_name + j, word]
                if lost != 0:
                    having ^= lost
                    for r in range(first, end):
                        if (lost >> (r - first)) & 1:
                            rows[OBSERVED_PREFIX_HIT, r] = j * p.block_size
                j += 1
        if having != 0:
            if j < stop and q.cached >= 0:  # it may have left some of its own text there
                j = stop
            for r in range(first, end):
                if (having >> (r - first)) & 1:
                    blocks = count_hits(p, s, e, r, request, j) if q.cached >= 0 else j
                    rows[OBSERVED_PREFIX_HIT, r] = blocks * p.block_size
    s.env[e].looked_up = request


@inlined
def hit_tokens_now(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> int:
    """`prefix_hit_tokens` of a replica that is up, from the observation if that is of now."""
    if s.env[e].looked_up == request:
        return int(s.observation[e, OBSERVED_PREFIX_HIT, r])
    return prefix_hit_tokens(p, s, e, r, request, now_s)


@inlined
def count_outstanding(s: State, e: int, r: int, request: int) -> None:
    """Take a request into the router's counters of a replica."""
    q = s.request[e, request]
    s.observation[e, OBSERVED_OUTSTANDING, r] += 1
    s.observation[e, OBSERVED_OUTSTANDING_PROMPT, r] += q.prompt
    s.observation[e, OBSERVED_OUTSTANDING_PREDICTED, r] += q.predicted


@inlined
def forget_outstanding(s: State, e: int, r: int, request: int) -> None:
    """Take a request out of the router's counters of a replica."""
    q = s.request[e, request]
    s.observation[e, OBSERVED_OUTSTANDING, r] -= 1
    s.observation[e, OBSERVED_OUTSTANDING_PROMPT, r] -= q.prompt
    s.observation[e, OBSERVED_OUTSTANDING_PREDICTED, r] -= q.predicted
    if s.observation[e, OBSERVED_OUTSTANDING, r] == 0:
        s.observation[e, OBSERVED_OUTSTANDING_PREDICTED, r] = 0.0  # no rounding left behind


@inlined
def count_prefill(s: State, e: int, r: int, request: int) -> None:
    """Take a prefill that a replica will do into the router's counters."""
    q = s.request[e, request]
    if math.isnan(q.first_token_s):
        s.observation[e, OBSERVED_PENDING_PREFILL, r] += q.prompt - q.hit_hint


@inlined
def forget_prefill(s: State, e: int, r: int, request: int) -> None:
    """Take a prefill that a replica will not do, or has done, out of the router's counters."""
    q = s.request[e, request]
    if math.isnan(q.first_token_s):
        s.observation[e, OBSERVED_PENDING_PREFILL, r] -= q.prompt - q.hit_hint


@inlined
def enqueue(p: Params, s: State, e: int, r: int, request: int) -> None:
    """Put a request at the end of a replica's queue."""
    v = s.replica[e, r]
    v.emitted += s.request[e, request].generated
    tail = v.wait_tail
    s.request[e, request].next_request = -1
    if tail >= 0:
        s.request[e, tail].next_request = request
    else:
        v.wait_head = request
    v.wait_tail = request
    v.num_waiting += 1
    if p.retains:
        expect(p, s, e, r, request)
    wake(p, s, e, r, s.env[e].now_s)


@inlined
def take_back(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Let a request that has lost what replica `r` did for it be dispatched anew."""
    q = s.request[e, request]
    q.status = RETURNED
    q.computed = 0
    q.chunk = 0
    q.join_iter = -1
    q.heap_pos = -1
    q.table_len = 0
    q.landed_tokens = 0
    q.next_request = -1
    q.prev_request = -1
    q.num_restarts += 1
    set_turn(s, e, now_s, RETURN, request)
    log_event(p, s, e, now_s, EV_RETURN, request, r, 0.0)
