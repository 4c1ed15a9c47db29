"""KV blocks with identities: the prefix cache of a replica, and what requests hold of it."""

from __future__ import annotations

from servegym.cluster.identities import text_at
from servegym.cluster.jit import helper, inlined
from servegym.cluster.pool import find_block, insert, set_free, take, unlink
from servegym.cluster.retention import make_room
from servegym.cluster.state import Params, State


@helper
def reset_blocks(p: Params, s: State, e: int, r: int) -> None:
    """Empty the cache: all blocks free, in index order, and all table rows unused."""
    v = s.replica[e, r]
    num_blocks = p.num_blocks[v.type_idx]
    v.free_blocks = num_blocks
    v.kept_blocks = 0
    if not p.prefix_caching:
        return
    blocks = s.block[e, r]
    end = blocks.shape[0] - 1
    cached_on, here = s.cached_on[e], 1 << (r & 63)
    for b in range(end):
        identity = blocks[b].identity
        if identity > 0:
            cached_on[identity, r >> 6] &= ~here
        blocks[b].identity = 0
    for b in range(num_blocks):
        blocks[b].holders = 0
        blocks[b].keepers = 0
        blocks[b].after = b + 1
        blocks[b].before = b - 1
    blocks[num_blocks - 1].after = end
    blocks[0].before = end
    blocks[end].after = 0
    blocks[end].before = num_blocks - 1
    prefix_cache = s.prefix_cache[e, r]
    for i in range(prefix_cache.shape[0]):
        prefix_cache[i] = -1
    v.num_reserve = 0
    rows = s.free_slots.shape[2]
    for i in range(rows):
        s.free_slots[e, r, i] = rows - 1 - i
    v.num_free_slots = rows


@inlined
def take_for_decodes(p: Params, s: State, e: int, r: int, count: int) -> None:
    """Take blocks for decoding requests; which block is whose is settled when one leaves."""
    v = s.replica[e, r]
    if not p.prefix_caching:
        v.free_blocks -= count
        return
    make_room(p, s, e, r, count)
    blocks, prefix_cache, reserve = s.block[e, r], s.prefix_cache[e, r], s.reserve[e, r]
    cached_on = s.cached_on[e]
    place = v.num_reserve
    take(blocks, prefix_cache, cached_on, r, reserve, place, place + count)
    v.num_reserve = place + count
    v.free_blocks -= count


@helper
def give_back_from_decodes(p: Params, s: State, e: int, r: int) -> None:
    """Put the latest block taken for decoding requests back: nobody wrote to it."""
    v = s.replica[e, r]
    v.free_blocks += 1
    if not p.prefix_caching:
        return
    v.num_reserve -= 1
    block = s.reserve[e, r, v.num_reserve]
    blocks = s.block[e, r]
    end = blocks.shape[0] - 1
    after = blocks[end].after
    blocks[block].holders = 0
    blocks[block].before = end
    blocks[block].after = after
    blocks[after].before = block
    blocks[end].after = block


@inlined
def take_for_chunk(
    p: Params, s: State, e: int, r: int, request: int, computed: int, tokens: int
) -> None:
    """Give a prefilling request the blocks of its next chunk and name those it fills."""
    take_blocks(p, s, e, r, request, computed + tokens)
    if p.prefix_caching:
        size = p.block_size
        name_blocks(p, s, e, r, request, computed // size, (computed + tokens) // size)


@inlined
def take_blocks(p: Params, s: State, e: int, r: int, request: int, tokens: int) -> None:
    """Give a request the blocks that so many of its tokens need, beside those in its table."""
    q = s.request[e, request]
    have = q.table_len  # of a request whose KV was loaded, all that its text needs
    need = max(have, (tokens + p.block_size - 1) // p.block_size)
    q.table_len = need
    if p.prefix_caching:
        make_room(p, s, e, r, need - have)
        row, blocks, prefix_cache = s.table[e, r, q.seq_slot], s.block[e, r], s.prefix_cache[e, r]
        take(blocks, prefix_cache, s.cached_on[e], r, row, have, need)
    s.replica[e, r].free_blocks -= need - have


@helper
def name_blocks(p: Params, s: State, e: int, r: int, request: int, first: int, end: int) -> None:
    """Give blocks `first..end-1` of a request their identities."""
    row, blocks = s.table[e, r, s.request[e, request].seq_slot], s.block[e, r]
    prefix_cache, cached_on, here = s.prefix_cache[e, r], s.cached_on[e], 1 << (r & 63)
    seg = s.request[e, request].segment_first
    j = first
    while j < end:
        seg, name, stop = text_at(p, s, e, request, j, seg)
        for i in range(j, min(stop, end)):
            identity = name + i
            insert(prefix_cache, blocks, identity, row[i])
            if identity > 0:
                cached_on[identity, r >> 6] |= here
        j = stop


@helper
def count_hits(p: Params, s: State, e: int, r: int, request: int, max_blocks: int) -> int:
    """Count the leading blocks of a request that are in the cache, at most `max_blocks`."""
    prefix_cache, blocks = s.prefix_cache[e, r], s.block[e, r]
    cached_on, here = s.cached_on[e], 1 << (r & 63)
    seg = s.request[e, request].segment_first
    j = 0
    while j < max_blocks:
        seg, name, stop = text_at(p, s, e, request, j, seg)
        for i in range(j, min(stop, max_blocks)):
            identity = name + i
            if identity > 0:
                if cached_on[identity, r >> 6] & here == 0:
                    return i
            elif find_block(prefix_cache, blocks, identity) < 0:
                return i
        j = stop
    return max_blocks


@helper
def match(p: Params, s: State, e: int, r: int, request: int, max_blocks: int) -> tuple[int, int]:
    """Write the cached leading blocks of a request into the next free table row.

    Returns:
        How many there are, and how many of them nobody holds.
    """
    row = s.table[e, r, s.free_slots[e, r, s.replica[e, r].num_free_slots - 1]]
    prefix_cache, blocks = s.prefix_cache[e, r], s.block[e, r]
    seg = s.request[e, request].segment_first
    unheld = 0
    j = 0
    while j < max_blocks:
        seg, name, stop = text_at(p, s, e, request, j, seg)
        for i in range(j, min(stop, max_blocks)):
            block = find_block(prefix_cache, blocks, name + i)
            if block < 0:
                return i, unheld
            row[i] = block
            if blocks[block].holders == 0:
                unheld += 1
        j = stop
    return max_blocks, unheld


@inlined
def hold_matched(p: Params, s: State, e: int, r: int, request: int, hits: int) -> None:
    """Give a request its table row, with the `hits` blocks `match` has just written there."""
    v = s.replica[e, r]
    q = s.request[e, request]
    q.table_len = hits
    if not p.prefix_caching:
        return
    v.num_free_slots -= 1
    slot = s.free_slots[e, r, v.num_free_slots]
    q.seq_slot = slot
    blocks = s.block[e, r]
    row = s.table[e, r, slot]
    for j in range(hits):
        block = row[j]
        if blocks[block].holders == 0:
            v.free_blocks -= 1
            if blocks[block].keepers == 0:
                unlink(blocks, block)
            else:
                v.kept_blocks -= 1
        blocks[block].holders += 1


@inlined
def settle_blocks(
    p: Params, s: State, e: int, r: int, request: int, computed: int, joined: int
) -> int:
    """Say which blocks a request that leaves the running list has, and name those it filled.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        request: The one that leaves.
        computed: Its tokens in the KV cache.
        joined: `computed` when it began to decode, -1 if it is still prefilling.

    Returns:
        How many it has; with prefix caching they are in its row of the block table.
    """
    v = s.replica[e, r]
    q = s.request[e, request]
    have = q.table_len
    held = have if joined < 0 else (computed + p.block_size - 1) // p.block_size
    q.table_len = held
    if p.prefix_caching and joined >= 0:
        row = s.table[e, r, q.seq_slot]
        for j in range(have, held):
            v.num_reserve -= 1
            row[j] = s.reserve[e, r, v.num_reserve]
        name_blocks(p, s, e, r, request, joined // p.block_size, computed // p.block_size)
    return held


@inlined
def release(p: Params, s: State, e: int, r: int, request: int, computed: int, joined: int) -> None:
    """Take all blocks from a request that leaves the running list.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        r: Replica.
        request: The one that leaves.
        computed: Its tokens in the KV cache.
        joined: `computed` when it began to decode, -1 if it is still prefilling.
    """
    v = s.replica[e, r]
    q = s.request[e, request]
    held = settle_blocks(p, s, e, r, request, computed, joined)
    q.table_len = 0
    if not p.prefix_caching:
        v.free_blocks += held
        return
    slot = q.seq_slot
    row, blocks = s.table[e, r, slot], s.block[e, r]
    for j in range(held - 1, -1, -1):  # the last ones may have no identity, others have
        block = row[j]
        blocks[block].holders -= 1
        if blocks[block].holders == 0:
            v.free_blocks += 1
            if blocks[block].keepers == 0:
                set_free(blocks, block)
            else:
                v.kept_blocks += 1
    s.free_slots[e, r, v.num_free_slots] = slot
    v.num_free_slots += 1
