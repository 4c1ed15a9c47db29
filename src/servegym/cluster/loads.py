"""Loading KV from the tiers of a replica instead of computing it anew: docs/kv-tiers.md.

A request whose KV is loaded is in the list of remote requests of its replica (`s.link`) and holds
blocks for its whole text: `TRANSFERRING` with a timer until the KV has landed, then `LANDED` until
it is admitted.
"""

from __future__ import annotations

from numba import types

from servegym.cluster.blocks import hold_matched, name_blocks, take_for_chunk
from servegym.cluster.entry import ADMIT_BESIDE_LOADS, LAND_LOAD, STOP_LOADS, entry
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.remote import join_remote, leave_remote, look_again, take_ahead
from servegym.cluster.retention import is_retained, let_go
from servegym.cluster.rng import block_identity, private_key
from servegym.cluster.router import forget_outstanding, forget_prefill, take_back
from servegym.cluster.running import admit_head, at_hand, leave_waiting, link_running
from servegym.cluster.state import (
    EV_ADMIT,
    EV_HOST,
    EV_LAND,
    EV_TRANSFER,
    HOST,
    LANDED,
    LANDING,
    NUM_TIERS,
    STORE,
    Params,
    State,
)
from servegym.cluster.steptime import dense_s, prefill_s
from servegym.cluster.tiers import lose_host, put, tier_with, touch
from servegym.cluster.timers import remove_timer, set_turn


@inlined
def _identity(p: Params, s: State, e: int, request: int, j: int) -> int:
    """Name the content of block `j` of a request."""
    q = s.request[e, request]
    last_token = (j + 1) * p.block_size - 1
    seg = q.segment_first
    while seg < q.segment_stop and s.segment[e, seg].end <= last_token:
        seg += 1
    key = s.segment[e, seg].key if seg < q.segment_stop else private_key(request)
    return block_identity(key, j)


@helper
def _look_up(
    p: Params, s: State, e: int, r: int, request: int, hits: int, stop: int, now_s: float
) -> int:
    """Count the blocks that can be loaded of a request, tier by tier, behind its first `hits`.

    Returns:
        How many there are, before block `stop`.
    """
    load = s.load[e, request]
    for tier in range(NUM_TIERS):
        load.blocks[tier] = 0
    for j in range(hits, stop):
        tier = tier_with(p, s, e, r, _identity(p, s, e, request, j), now_s)
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
def _landing_s(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> float:
    """When the blocks that were looked up would be here if they were loaded now."""
    t = s.replica[e, r].type_idx
    landing_s = now_s
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
        total_s += dense_s(p, t, chunk) + prefill_s(p, t, chunk, computed)
        computed += chunk
        tokens -= chunk
    return total_s / v.speed


@helper
def _begin(
    p: Params, s: State, e: int, r: int, request: int, hits: int, found: int, now_s: float
) -> None:
    """Begin to load blocks of the head of the queue; set blocks aside for its whole text."""
    v, q, load = s.replica[e, r], s.request[e, request], s.load[e, request]
    landing_s = _landing_s(p, s, e, r, request, now_s)
    for tier in range(NUM_TIERS):
        blocks = load.blocks[tier]
        if blocks > 0:
            done_s = _read_until_s(p, s, e, r, tier, blocks, now_s)
            s.tier[e, r, tier].read_free_s = done_s
            if tier == STORE:
                s.env[e].store_read_free_s = _store_until_s(p, s, e, blocks, now_s)
                done_s = max(done_s, s.env[e].store_read_free_s)
            v.slowed_until_s = max(v.slowed_until_s, done_s)
    for j in range(hits + found - 1, hits - 1, -1):
        identity = _identity(p, s, e, request, j)
        touch(s, e, r, tier_with(p, s, e, r, identity, now_s), identity)
    leave_waiting(s, e, r, request)
    v.emitted -= q.generated
    hold_matched(p, s, e, r, request, hits)
    if p.retains and is_retained(s, e, r, q.after):
        let_go(p, s, e, r, q.after)
    blocks = (q.prompt + q.generated + p.block_size - 1) // p.block_size
    take_ahead(p, s, e, r, q.seq_slot, hits, blocks)
    q.table_len = blocks
    join_remote(s, e, r, request)
    load.hits = hits
    load.begin_s = now_s
    set_turn(s, e, landing_s, LANDING, request)
    log_event(p, s, e, now_s, EV_TRANSFER, request, r, found * p.kv_block_bytes)


@inlined
def _num_loaded(s: State, e: int, request: int) -> int:
    """Blocks of the load in progress or landed."""
    found = 0
    for tier in range(NUM_TIERS):
        found += s.load[e, request].blocks[tier]
    return found


@entry(LAND_LOAD, types.void, types.int64, types.int64)
def land_load(p: Params, s: State, e: int, request: int) -> None:
    """The KV of a request has come; what came from further away is in the host's memory, too."""
    now_s = s.env[e].now_s
    q, load = s.request[e, request], s.load[e, request]
    r = q.replica
    found = _num_loaded(s, e, request)
    if load.blocks[HOST] < found and p.tier_num_blocks[s.replica[e, r].type_idx, HOST] > 0:
        for j in range(load.hits + found - 1, load.hits - 1, -1):
            identity = _identity(p, s, e, request, j)
            if tier_with(p, s, e, r, identity, float("inf")) != HOST:
                put(p, s, e, r, HOST, identity, now_s)
    q.status = LANDED
    s.link[e, r].num_landed += 1
    load.landed_s = now_s
    load.moved_bytes += found * p.kv_block_bytes
    log_event(p, s, e, now_s, EV_LAND, request, r, found * p.kv_block_bytes)
    for tier in range(NUM_TIERS):
        blocks = load.blocks[tier]
        if blocks > 0:
            load.tokens[tier] += blocks * p.block_size
            s.tier[e, r, tier].read_bytes += blocks * p.kv_block_bytes
            log_event(p, s, e, now_s, EV_HOST + tier, request, r, blocks * p.block_size)
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
        q = s.request[e, request]
        following = q.next_request
        if q.status == LANDED:
            hits = s.load[e, request].hits
            there = hits + _num_loaded(s, e, request)
            computed = there * p.block_size
            rest = q.prompt + q.generated - computed
            take = min(rest, budget)
            if not p.chunked_prefill and take < rest:
                k.budget = budget
                return attention_s
            leave_remote(s, e, r, request)
            k.num_landed -= 1
            link_running(s, e, r, request)
            q.computed = computed
            if q.cached < 0:
                q.cached = computed
                q.scheduled_s = now_s
                log_event(p, s, e, now_s, EV_ADMIT, request, r, computed)
            name_blocks(p, s, e, r, request, hits, there)
            take_for_chunk(p, s, e, r, request, computed, take)
            q.chunk = take
            budget -= take
            attention_s += prefill_s(p, t, take, computed)
        request = following
    while budget > 0 and v.num_waiting > 0 and v.num_running < p.max_num_seqs[t]:
        if k.num_remote >= p.max_num_seqs[t]:
            break
        request = v.wait_head
        q = s.request[e, request]
        total = q.prompt + q.generated
        hits, unheld, computed = at_hand(p, s, e, r, request)
        take = min(total - computed, budget)
        if not p.chunked_prefill and take < total - computed:
            break
        if (total + p.block_size - 1) // p.block_size - hits + unheld > v.free_blocks:
            break
        found = _look_up(p, s, e, r, request, hits, (total - 1) // p.block_size, now_s)
        if found > 0 and (
            not p.loads_if_faster
            or _landing_s(p, s, e, r, request, now_s) - now_s
            < recompute_s(p, s, e, r, computed, found * p.block_size)
        ):
            _begin(p, s, e, r, request, hits, found, now_s)
            continue
        admit_head(p, s, e, r, now_s, hits, computed, take)
        budget -= take
        attention_s += prefill_s(p, t, take, computed)
    k.budget = budget
    return attention_s


@entry(STOP_LOADS, types.void, types.int64, types.int64, types.float64)
def stop_loads(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """A replica fails: requests whose KV came or had landed go back, and its memory is lost."""
    k = s.link[e, r]
    request = k.first_remote
    while request >= 0:
        q = s.request[e, request]
        following = q.next_request
        if q.timer_pos >= 0:
            remove_timer(s, e, q.timer_pos)
        forget_outstanding(s, e, r, request)
        forget_prefill(s, e, r, request)
        take_back(p, s, e, r, request, now_s)
        request = following
    clear_loads(s, e, r)
    lose_host(p, s, e, r)


@inlined
def clear_loads(s: State, e: int, r: int) -> None:
    """Let nobody's KV come to a replica."""
    k = s.link[e, r]
    k.first_remote = -1
    k.last_remote = -1
    k.num_remote = 0
    k.num_landed = 0
