"""KV that comes to a replica from another one: links, memory at both ends, admission.

A request whose KV is on its way is in the list of remote requests of where it goes, and holds
blocks there; `State.transfer` has what it holds elsewhere. When the KV has landed it is admitted
before those that wait.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.blocks import name_blocks, release, take_for_chunk
from servegym.cluster.entry import ADMIT_LANDED, entry
from servegym.cluster.heap import set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.pool import take
from servegym.cluster.retention import make_room
from servegym.cluster.running import link_running
from servegym.cluster.state import (
    DOWN,
    EV_LAND,
    IDLE,
    LANDED,
    TRANSFERRING,
    WAKING,
    Params,
    State,
)
from servegym.cluster.steptime import prefill_s
from servegym.cluster.stretches import catch_up, cut_stretch


@inlined
def take_ahead(p: Params, s: State, e: int, r: int, slot: int, have: int, need: int) -> None:
    """Add blocks to a row of the block table of a request that does not run there.

    They get their identities when it is admitted.
    """
    if p.prefix_caching:
        make_room(p, s, e, r, need - have)
        row, pool, prefix_cache = s.table[e, r, slot], s.block[e, r], s.prefix_cache[e, r]
        cached_on = s.cached_on[e]
        take(pool, prefix_cache, cached_on, r, row, have, need)
    s.replica[e, r].free_blocks -= need - have


@inlined
def are_enough(p: Params, s: State, e: int, r: int) -> bool:
    """Whether as many requests hold blocks of a replica as can."""
    v = s.replica[e, r]
    most = p.max_num_seqs[v.type_idx] + p.max_num_held
    return bool(v.num_running + s.link[e, r].num_holding >= most)


@inlined
def sent_s(
    p: Params, s: State, e: int, source: int, r: int, poster: int, blocks: int, now_s: float
) -> float:
    """When blocks will have left one replica for another; one of the two, `poster`, posts them."""
    a, b = s.replica[e, source].type_idx, s.replica[e, r].type_idx
    busy_s = blocks * p.kv_block_pieces * p.link_piece_s[s.replica[e, poster].type_idx]
    busy_s += blocks * p.kv_block_bytes / min(p.link_bytes_per_s[a], p.link_bytes_per_s[b])
    return max(now_s, s.link[e, source].out_free_s, s.link[e, r].in_free_s) + busy_s


@inlined
def book(
    p: Params, s: State, e: int, request: int, source: int, r: int, blocks: int, now_s: float
) -> float:
    """Send blocks of a request from one replica to another; return when they land, seconds."""
    t, poster = s.transfer[e, request], source if p.destination_first else r
    free_s = sent_s(p, s, e, source, r, poster, blocks, now_s)
    s.link[e, source].out_free_s = free_s
    s.link[e, r].in_free_s = free_s
    t.num_bytes = blocks * p.kv_block_bytes
    t.begin_s = now_s
    return free_s + p.link_latency_s[s.replica[e, poster].type_idx]


@inlined
def book_landed(p: Params, s: State, e: int, request: int, source: int, r: int) -> None:
    """Note that what was sent last of a request has landed."""
    t = s.transfer[e, request]
    now_s = s.env[e].now_s
    t.landed_s = now_s
    t.moved_bytes += t.num_bytes
    s.link[e, source].out_bytes += t.num_bytes
    s.link[e, r].in_bytes += t.num_bytes
    log_event(p, s, e, now_s, EV_LAND, request, r, t.num_bytes)


@inlined
def join_remote(s: State, e: int, r: int, request: int) -> None:
    """Put a request at the end of the list of those whose KV comes to a replica."""
    q, k = s.request[e, request], s.link[e, r]
    q.status = TRANSFERRING
    q.replica = r
    s.replica[e, r].emitted += q.generated
    q.next_request = -1
    q.prev_request = k.last_remote
    if k.last_remote >= 0:
        s.request[e, k.last_remote].next_request = request
    else:
        k.first_remote = request
    k.last_remote = request
    k.num_remote += 1


@inlined
def land(p: Params, s: State, e: int, request: int, now_s: float) -> None:
    """All KV of a request has come: it can be admitted, and its source is free of it."""
    q = s.request[e, request]
    q.status = LANDED
    release_source(p, s, e, request, now_s, now_s)
    s.link[e, q.replica].num_landed += 1
    look_again(p, s, e, q.replica, now_s, now_s)


@inlined
def leave_remote(s: State, e: int, r: int, request: int) -> None:
    """Take a request out of the list of those whose KV comes to a replica or has landed there."""
    q, k = s.request[e, request], s.link[e, r]
    before, after = q.prev_request, q.next_request
    if before >= 0:
        s.request[e, before].next_request = after
    else:
        k.first_remote = after
    if after >= 0:
        s.request[e, after].prev_request = before
    else:
        k.last_remote = before
    k.num_remote -= 1
    q.next_request = -1
    q.prev_request = -1


@helper
def release_source(
    p: Params, s: State, e: int, request: int, now_s: float, ended_by_s: float
) -> None:
    """Give back the blocks of a request where its KV was; `ended_by_s` as in `look_again`."""
    t = s.transfer[e, request]
    source = t.source
    t.source = -1
    catch_up(p, s, e, source, ended_by_s)
    release_at(p, s, e, request, source, t.source_slot, t.source_blocks)
    look_again(p, s, e, source, now_s, ended_by_s)


@inlined
def release_at(p: Params, s: State, e: int, request: int, r: int, slot: int, blocks: int) -> None:
    """Give back the blocks that a request holds of a replica in whose lists it is not."""
    q = s.request[e, request]
    own_slot, own_blocks = q.seq_slot, q.table_len
    q.seq_slot = slot
    q.table_len = blocks
    release(p, s, e, r, request, 0, -1)
    q.seq_slot = own_slot
    q.table_len = own_blocks
    s.link[e, r].num_holding -= 1


@helper
def look_again(p: Params, s: State, e: int, r: int, now_s: float, ended_by_s: float) -> None:
    """Blocks are free, or KV has landed: let the engine see what it can admit.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        now_s: Time, seconds.
        ended_by_s: Steps that end later are still in progress.
    """
    v = s.replica[e, r]
    if v.mode == DOWN or (v.num_waiting == 0 and s.link[e, r].num_landed == 0):
        return
    if v.mode == IDLE:
        v.mode = WAKING
        if s.due[e, v.event_pos].time_s == math.inf:  # else other ranks are in a step
            set_event(s, e, r, np.nextafter(now_s, math.inf))
    elif v.num_running < p.max_num_seqs[v.type_idx]:
        cut_stretch(p, s, e, r, ended_by_s)


@inlined
def admit_there(
    p: Params, s: State, e: int, r: int, request: int, hits: int, computed: int, take: int
) -> None:
    """Move a request whose KV has landed to the running list, with its first chunk.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        request: The one.
        hits: Blocks of it that have had their identities before.
        computed: Tokens whose KV is there.
        take: Tokens of the chunk.
    """
    q, k = s.request[e, request], s.link[e, r]
    leave_remote(s, e, r, request)
    k.num_landed -= 1
    if p.moves_kv:
        k.num_holding -= 1
    link_running(s, e, r, request)
    q.computed = computed
    if p.prefix_caching:
        name_blocks(p, s, e, r, request, hits, computed // p.block_size)
    take_for_chunk(p, s, e, r, request, computed, take)
    q.chunk = take


@entry(ADMIT_LANDED, types.float64, types.int64, types.int64, types.int64, types.float64)
def admit_landed(p: Params, s: State, e: int, r: int, budget: int, attention_s: float) -> float:
    """Admit requests whose KV has landed: each computes its last token, and emits one.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        budget: Tokens left of the step that forms.
        attention_s: Of its prefills.

    Returns:
        Those seconds, theirs included.
    """
    v, k = s.replica[e, r], s.link[e, r]
    t = v.type_idx
    request = k.first_remote
    while k.num_landed > 0 and budget > 0 and v.num_running < p.max_num_seqs[t]:
        q = s.request[e, request]
        following = q.next_request
        if q.status == LANDED:
            computed = q.prompt + q.generated - 1
            admit_there(p, s, e, r, request, s.transfer[e, request].hits, computed, 1)
            budget -= 1
            attention_s += prefill_s(p, t, 1, computed)
        request = following
    return attention_s


@inlined
def clear_links(s: State, e: int, r: int) -> None:
    """Forget what is on its way to and from a replica, and who holds its blocks."""
    k = s.link[e, r]
    k.out_free_s = 0.0
    k.in_free_s = 0.0
    k.num_holding = 0
    k.first_remote = -1
    k.last_remote = -1
    k.num_remote = 0
    k.num_landed = 0
