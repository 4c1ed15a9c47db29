"""Loading KV from tiers and from peers instead of computing it anew: docs/kv-tiers.md.

A request whose KV is loaded is in the list of remote requests of its replica (`s.link`) and holds
blocks for its whole text: `TRANSFERRING` with a timer until the KV has landed, then `LANDED` until
it is admitted. Beside it there can be requests whose KV comes from other replicas: see `is_loaded`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.blocks import hold_matched
from servegym.cluster.entry import ADMIT_BESIDE_LOADS, LAND_LOAD, STOP_LOADS, entry
from servegym.cluster.identities import identity_of, segment_before, segment_of
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.peers import begin_fetch, end_fetch, fetched_s, find_peer, lose_fetches
from servegym.cluster.remote import (
    admit_there,
    are_enough,
    join_remote,
    leave_remote,
    look_again,
    release_source,
    take_ahead,
)
from servegym.cluster.retention import is_retained, let_go
from servegym.cluster.router import forget_outstanding, forget_prefill, take_back
from servegym.cluster.running import admit_head, at_hand, leave_waiting
from servegym.cluster.state import (
    EV_ADMIT,
    EV_HOST,
    EV_LAND,
    EV_PEER,
    EV_TRANSFER,
    HOST,
    LANDED,
    LANDING,
    NUM_SOURCES,
    NUM_TIERS,
    PEER,
    STORE,
    Params,
    State,
)
from servegym.cluster.steptime import dense_s, prefill_s
from servegym.cluster.tiers import lose_host, put, tier_with, touch
from servegym.cluster.timers import remove_timer, set_turn
from servegym.cluster.transfers import give_up_target, is_prefilled_elsewhere, set_aside


@helper
def _look_up(
    p: Params, s: State, e: int, r: int, request: int, hits: int, stop: int, now_s: float
) -> int:
    """Count the blocks that can be loaded of a request, tier by tier, behind its first `hits`.

    Returns:
        How many there are, before block `stop`.
    """
    load = s.load[e, request]
    for source in range(NUM_SOURCES):
        load.blocks[source] = 0
    seg = s.request[e, request].segment_first
    for j in range(hits, stop):
        seg = segment_of(p, s, e, request, j, seg)
        tier = tier_with(p, s, e, r, identity_of(s, e, request, j, seg), now_s)
        if tier < 0:
            return j - hits
        load.blocks[tier] += 1
    return stop - hits


@inlined
def _read_until_s(
    p: Params, s: State, e: int, r: int, tier: int, blocks: int, now_s: float
) -> float:
    """When a tier will have sent so many blocks more."""
    num_bytes = blocks * p.kv_block_bytes
    k, t = s.tier[e, r, tier], s.replica[e, r].type_idx
    return max(now_s, k.read_free_s) + num_bytes / p.tier_read_bytes_per_s[t, tier]


@inlined
def _store_until_s(p: Params, s: State, e: int, blocks: int, now_s: float) -> float:
    """The same of the store itself, which all replicas read."""
    return max(now_s, s.env[e].store_read_free_s) + blocks * p.kv_block_bytes / p.store_bytes_per_s


@helper
def _landing_s(p: Params, s: State, e: int, r: int, request: int, peer: int, now_s: float) -> float:
    """When the blocks that were looked up would be here if they were loaded now."""
    t = s.replica[e, r].type_idx
    landing_s = now_s
    fetched = s.load[e, request].blocks[PEER]
    if fetched > 0:
        landing_s = max(landing_s, fetched_s(p, s, e, r, peer, fetched, now_s)[1])
    for tier in range(NUM_TIERS):
        blocks = s.load[e, request].blocks[tier]
        if blocks > 0:
            done_s = _read_until_s(p, s, e, r, tier, blocks, now_s)
            if tier == STORE:
                done_s = max(done_s, _store_until_s(p, s, e, blocks, now_s))
            landing_s = max(landing_s, done_s + p.tier_latency_s[t, tier])
    return landing_s


@helper
def recompute_s(p: Params, s: State, e: int, r: int, computed: int, tokens: int) -> float:
    """Seconds of the steps that compute so many tokens alone, behind `computed` others."""
    v = s.replica[e, r]
    t = v.type_idx
    total_s = 0.0
    while tokens > 0:
        chunk = min(tokens, p.max_num_batched_tokens[t])
        total_s += max(dense_s(p, t, chunk) + prefill_s(p, t, chunk, computed), p.eager_s[t])
        computed += chunk
        tokens -= chunk
    return total_s / v.speed


@inlined
def _is_worth_it(
    p: Params, s: State, e: int, r: int, request: int, computed: int, peer: int, now_s: float
) -> bool:
    """Whether there is something to load, and that is to be done instead of computing it."""
    found = _num_loaded(s, e, request)
    if found == 0 or not p.loads_if_faster:
        return found > 0
    loading_s = _landing_s(p, s, e, r, request, peer, now_s) - now_s
    return bool(loading_s < recompute_s(p, s, e, r, computed, found * p.block_size))


@helper
def _begin(
    p: Params, s: State, e: int, r: int, request: int, hits: int, peer: int, now_s: float
) -> None:
    """Begin to load blocks of the head of the queue; set blocks aside for its whole text."""
    v, q, load = s.replica[e, r], s.request[e, request], s.load[e, request]
    landing_s = _landing_s(p, s, e, r, request, peer, now_s)
    found = _num_loaded(s, e, request)
    from_tiers = found - load.blocks[PEER]
    for tier in range(NUM_TIERS):
        blocks = load.blocks[tier]
        if blocks > 0:
            done_s = _read_until_s(p, s, e, r, tier, blocks, now_s)
            s.tier[e, r, tier].read_free_s = done_s
            if tier == STORE:
                s.env[e].store_read_free_s = _store_until_s(p, s, e, blocks, now_s)
                done_s = max(done_s, s.env[e].store_read_free_s)
            v.slowed_until_s = max(v.slowed_until_s, done_s)
    seg = q.segment_stop
    for j in range(hits + from_tiers - 1, hits - 1, -1):
        seg = segment_before(p, s, e, request, j, seg)
        identity = identity_of(s, e, request, j, seg)
        touch(s, e, r, tier_with(p, s, e, r, identity, now_s), identity)
    leave_waiting(s, e, r, request)
    v.emitted -= q.generated
    hold_matched(p, s, e, r, request, hits)
    if p.retains and is_retained(s, e, r, q.after):
        let_go(p, s, e, r, q.after)
    blocks = (q.prompt + q.generated + p.block_size - 1) // p.block_size
    take_ahead(p, s, e, r, q.seq_slot, hits, blocks)
    q.table_len = blocks
    if load.blocks[PEER] > 0:
        begin_fetch(p, s, e, r, peer, request, hits + from_tiers, now_s)
    join_remote(s, e, r, request)
    if p.moves_kv:
        s.link[e, r].num_holding += 1
    load.hits = hits
    load.begin_s = now_s
    set_turn(s, e, landing_s, LANDING, request)
    log_event(p, s, e, now_s, EV_TRANSFER, request, r, found * p.kv_block_bytes)


@inlined
def is_loaded(s: State, e: int, request: int) -> bool:
    """Whether KV of a request comes from the tiers, or has come and it waits to be admitted."""
    return bool(s.load[e, request].hits >= 0)


@inlined
def _num_loaded(s: State, e: int, request: int) -> int:
    """Blocks of the load in progress or landed, or of what was looked up."""
    found = 0
    for source in range(NUM_SOURCES):
        found += s.load[e, request].blocks[source]
    return found


@entry(LAND_LOAD, types.void, types.int64, types.int64)
def land_load(p: Params, s: State, e: int, request: int) -> None:
    """The KV of a request has come; what came from further away is in the host's memory, too."""
    now_s = s.env[e].now_s
    q, load = s.request[e, request], s.load[e, request]
    r = q.replica
    found = _num_loaded(s, e, request)
    if load.blocks[PEER] > 0:
        end_fetch(p, s, e, r, request, now_s)
    if load.blocks[HOST] < found and p.tier_num_blocks[s.replica[e, r].type_idx, HOST] > 0:
        seg = q.segment_stop
        for j in range(load.hits + found - 1, load.hits - 1, -1):
            seg = segment_before(p, s, e, request, j, seg)
            identity = identity_of(s, e, request, j, seg)
            if tier_with(p, s, e, r, identity, float("inf")) != HOST:
                put(p, s, e, r, HOST, identity, now_s)
    q.status = LANDED
    s.link[e, r].num_landed += 1
    load.landed_s = now_s
    load.moved_bytes += found * p.kv_block_bytes
    log_event(p, s, e, now_s, EV_LAND, request, r, found * p.kv_block_bytes)
    for source in range(NUM_SOURCES):
        blocks = load.blocks[source]
        if blocks > 0:
            load.tokens[source] += blocks * p.block_size
            if source != PEER:
                s.tier[e, r, source].read_bytes += blocks * p.kv_block_bytes
            kind = EV_PEER if source == PEER else EV_HOST + source
            log_event(p, s, e, now_s, kind, request, r, blocks * p.block_size)
    look_again(p, s, e, r, now_s, now_s)


@entry(
    ADMIT_BESIDE_LOADS,
    types.float64,
    *[types.int64] * 2,
    types.float64,
    types.int64,
    types.float64,
)
def admit_beside_loads(
    p: Params, s: State, e: int, r: int, now_s: float, budget: int, attention_s: float
) -> float:
    """Admit what has landed, then waiting requests, or begin to load their KV.

    Where KV comes from other replicas, too, blocks are set aside for it as in `admit_apart`.

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
    request = k.first_remote
    while k.num_landed > 0 and budget > 0 and v.num_running < p.max_num_seqs[t]:
        q, load = s.request[e, request], s.load[e, request]
        following = q.next_request
        if q.status == LANDED:
            hits, computed = load.hits, (load.hits + _num_loaded(s, e, request)) * p.block_size
            if not is_loaded(s, e, request):
                hits, computed = s.transfer[e, request].hits, q.prompt + q.generated - 1
            rest = q.prompt + q.generated - computed
            take = min(rest, budget)
            if not p.chunked_prefill and take < rest:
                k.budget = budget
                return attention_s
            if q.cached < 0:
                q.cached = computed
                q.scheduled_s = now_s
                log_event(p, s, e, now_s, EV_ADMIT, request, r, computed)
            admit_there(p, s, e, r, request, hits, computed, take)
            load.hits = -1
            budget -= take
            attention_s += prefill_s(p, t, take, computed)
        request = following
    while budget > 0 and v.num_waiting > 0 and v.num_running < p.max_num_seqs[t]:
        if are_enough(p, s, e, r) if p.moves_kv else k.num_remote >= p.max_num_seqs[t]:
            break
        request = v.wait_head
        q = s.request[e, request]
        if p.disaggregated and is_prefilled_elsewhere(s, e, request):
            if set_aside(p, s, e, r, now_s) == 0:
                break
            continue
        total = q.prompt + q.generated
        hits, unheld, computed = at_hand(p, s, e, r, request)
        take = min(total - computed, budget)
        if not p.chunked_prefill and take < total - computed:
            break
        if (total + p.block_size - 1) // p.block_size - hits + unheld > v.free_blocks:
            break
        stop, peer = (total - 1) // p.block_size, -1
        here = hits + _look_up(p, s, e, r, request, hits, stop, now_s)
        if p.balancing_threshold > 0.0:
            peer, fetched = find_peer(p, s, e, r, request, here, stop, now_s)
            load = s.load[e, request]
            load.blocks[PEER] = fetched
            if fetched > 0 and not _is_worth_it(p, s, e, r, request, computed, peer, now_s):
                load.blocks[PEER] = 0
        if _is_worth_it(p, s, e, r, request, computed, peer, now_s):
            _begin(p, s, e, r, request, hits, peer, now_s)
            continue
        admit_head(p, s, e, r, now_s, hits, computed, take)
        budget -= take
        attention_s += prefill_s(p, t, take, computed)
    k.budget = budget
    return attention_s


@entry(STOP_LOADS, types.void, types.int64, types.int64, types.float64)
def stop_loads(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """A replica fails: requests that were loaded there go back, and its memory is lost.

    Requests whose KV comes from other replicas stay in the list: they are not ours.
    """
    ended_by_s = np.nextafter(now_s, -math.inf)  # faults come before the steps that end now
    k = s.link[e, r]
    request = k.first_remote
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        if is_loaded(s, e, request):
            if q.status == LANDED:
                k.num_landed -= 1
            if q.timer_pos >= 0:
                remove_timer(s, e, q.timer_pos)
            leave_remote(s, e, r, request)
            if s.load[e, request].blocks[PEER] > 0 and s.transfer[e, request].source >= 0:
                release_source(p, s, e, request, now_s, ended_by_s)
            s.load[e, request].hits = -1
            forget_outstanding(s, e, r, request)
            forget_prefill(s, e, r, request)
            if p.disaggregated:
                give_up_target(p, s, e, request, now_s, ended_by_s)
            take_back(p, s, e, r, request, now_s)
        request = following
    if p.balancing_threshold > 0.0:
        lose_fetches(s, e, r)
    lose_host(p, s, e, r)


@inlined
def clear_loads(s: State, e: int, r: int) -> None:
    """Let nobody's KV come to a replica."""
    k = s.link[e, r]
    k.first_remote = -1
    k.last_remote = -1
    k.num_remote = 0
    k.num_landed = 0
