"""Tiers behind the KV blocks of a replica: what is in them, and writing to them; docs/kv-tiers.md.

The memory of a replica's host, its disk and the store of the cluster hold copies of blocks, found
by the identities that the prefix cache gives them. Each forgets those that were used longest ago. A
copy can be used from `ready_s` on, when it has been written.
"""

from __future__ import annotations

from numba import types

from servegym.cluster.entry import LOSE_HOST, RESET_TIERS, STORE_TEXT, entry
from servegym.cluster.identities import identity_of, segment_before
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_event
from servegym.cluster.pool import find_block, forget, insert, unlink
from servegym.cluster.state import (
    DISK,
    EV_STORED,
    HOST,
    NUM_SOURCES,
    NUM_TIERS,
    STORE,
    Params,
    Records,
    State,
)


@inlined
def _use(blocks: Records, block: int) -> None:
    """Put a block that is in no list to the end of that of its tier: it was used last."""
    end = blocks.shape[0] - 1
    before = blocks[end].before
    blocks[before].after = block
    blocks[block].before = before
    blocks[block].after = end
    blocks[end].before = block


@inlined
def touch(s: State, e: int, r: int, tier: int, identity: int) -> None:
    """Note that a block of a tier was used."""
    blocks = s.store_block[e] if tier == STORE else s.tier_block[e, r, tier]
    cache = s.store_cache[e] if tier == STORE else s.tier_cache[e, r, tier]
    block = find_block(cache, blocks, identity)
    unlink(blocks, block)
    _use(blocks, block)


@helper
def tier_with(p: Params, s: State, e: int, r: int, identity: int, now_s: float) -> int:
    """The first tier in which a block can be used now, -1 if it can in none."""
    t = s.replica[e, r].type_idx
    for tier in range(NUM_TIERS):
        if p.tier_num_blocks[t, tier] > 0:
            blocks = s.store_block[e] if tier == STORE else s.tier_block[e, r, tier]
            cache = s.store_cache[e] if tier == STORE else s.tier_cache[e, r, tier]
            block = find_block(cache, blocks, identity)
            if block >= 0 and blocks[block].ready_s <= now_s:
                return tier
    return -1


@helper
def put(p: Params, s: State, e: int, r: int, tier: int, identity: int, ready_s: float) -> None:
    """Let a tier have a block, in place of the one used longest ago if it is full."""
    env, k = s.env[e], s.tier[e, r, tier]
    blocks = s.store_block[e] if tier == STORE else s.tier_block[e, r, tier]
    cache = s.store_cache[e] if tier == STORE else s.tier_cache[e, r, tier]
    size = env.store_num_blocks if tier == STORE else k.num_blocks
    if size < p.tier_num_blocks[s.replica[e, r].type_idx, tier]:
        block = size
        if tier == STORE:
            env.store_num_blocks = size + 1
        else:
            k.num_blocks = size + 1
    else:
        block = blocks[blocks.shape[0] - 1].after
        unlink(blocks, block)
        forget(cache, blocks, block)
    blocks[block].ready_s = ready_s
    insert(cache, blocks, identity, block)
    _use(blocks, block)


@helper
def _write(p: Params, s: State, e: int, r: int, tier: int, identity: int, now_s: float) -> float:
    """Write a block to a tier, unless it is there; return the bytes."""
    blocks = s.store_block[e] if tier == STORE else s.tier_block[e, r, tier]
    cache = s.store_cache[e] if tier == STORE else s.tier_cache[e, r, tier]
    if find_block(cache, blocks, identity) >= 0:
        touch(s, e, r, tier, identity)
        return 0.0
    env, k, t = s.env[e], s.tier[e, r, tier], s.replica[e, r].type_idx
    written = p.kv_block_bytes
    k.write_free_s = max(now_s, k.write_free_s) + written / p.tier_write_bytes_per_s[t, tier]
    done_s = k.write_free_s
    if tier == STORE:
        own_s = max(now_s, env.store_write_free_s) + written / p.store_bytes_per_s
        env.store_write_free_s = own_s
        done_s = max(done_s, own_s)
    put(p, s, e, r, tier, identity, done_s + p.tier_latency_s[t, tier])
    k.written_bytes += written
    return written


@entry(STORE_TEXT, types.void, types.int64, types.int64, types.int64, types.float64)
def store_text(p: Params, s: State, e: int, r: int, request: int, now_s: float) -> None:
    """Write the full blocks of what a request has computed to all tiers, its last block first."""
    q, v = s.request[e, request], s.replica[e, r]
    t = v.type_idx
    seg = q.segment_stop
    stored = 0.0
    for j in range(q.computed // p.block_size - 1, -1, -1):
        seg = segment_before(p, s, e, request, j, seg)
        identity = identity_of(s, e, request, j, seg)
        for tier in range(NUM_TIERS):
            if p.tier_num_blocks[t, tier] > 0:
                stored += _write(p, s, e, r, tier, identity, now_s)
    if stored > 0.0:
        first = HOST  # the others get theirs from there, and not from the GPU
        while p.tier_num_blocks[t, first] == 0:
            first += 1
        v.slowed_until_s = max(v.slowed_until_s, s.tier[e, r, first].write_free_s)
        s.load[e, request].stored_bytes += stored
        log_event(p, s, e, now_s, EV_STORED, request, r, stored)


@inlined
def _empty(s: State, e: int, r: int, tier: int) -> None:
    blocks = s.store_block[e] if tier == STORE else s.tier_block[e, r, tier]
    cache = s.store_cache[e] if tier == STORE else s.tier_cache[e, r, tier]
    end = blocks.shape[0] - 1
    blocks[end].after = end
    blocks[end].before = end
    for i in range(cache.shape[0]):
        cache[i] = -1


@entry(LOSE_HOST, types.void, types.int64, types.int64)
def lose_host(p: Params, s: State, e: int, r: int) -> None:
    """A replica fails: what was in its process's memory is lost; its links are idle."""
    if p.tier_num_blocks[s.replica[e, r].type_idx, HOST] > 0:
        _empty(s, e, r, HOST)
        s.tier[e, r, HOST].num_blocks = 0
    for tier in range(NUM_TIERS):
        s.tier[e, r, tier].read_free_s = 0.0
        s.tier[e, r, tier].write_free_s = 0.0
    s.replica[e, r].slowed_until_s = 0.0


@entry(RESET_TIERS, types.void, types.int64)
def reset_tiers(p: Params, s: State, e: int) -> None:
    """Empty all tiers of one environment, and forget what was moved."""
    env = s.env[e]
    env.store_num_blocks = 0
    env.store_read_free_s = 0.0
    env.store_write_free_s = 0.0
    _empty(s, e, 0, STORE)
    for r in range(env.num_replicas):
        lose_host(p, s, e, r)
        _empty(s, e, r, DISK)
        for tier in range(NUM_TIERS):
            s.tier[e, r, tier].num_blocks = 0
            s.tier[e, r, tier].read_bytes = 0.0
            s.tier[e, r, tier].written_bytes = 0.0
    for i in range(env.num_requests):
        load = s.load[e, i]
        load.hits = -1
        for source in range(NUM_SOURCES):
            load.blocks[source] = 0
            load.tokens[source] = 0
        load.begin_s = float("nan")
        load.landed_s = float("nan")
        load.moved_bytes = 0.0
        load.stored_bytes = 0.0
