"""The KV blocks of a replica: a free list by last use, and which of them has which identity."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import Records
from servegym.typing import IntArray


@inlined
def _tag_of(identity: int) -> int:
    """31 bits of an identity, which the map keeps beside its block; they rarely lie."""
    return (identity ^ (identity >> 32)) & 0x7FFFFFFF


@inlined
def _slot_of(tag: int, mask: int) -> int:
    """Where to look first: eight blocks in a row of one text lie in one cache line."""
    return (((((tag >> 3) * 0x9E3779B1) >> 16) << 3) | (tag & 7)) & mask


@inlined
def find_block(prefix_cache: Records, blocks: Records, identity: int) -> int:
    """Return the block with this identity, or -1.

    Args:
        prefix_cache: `State.prefix_cache[e, r]`; callers look it up before their loops.
        blocks: `State.block[e, r]`, or those of a tier, whose map it is.
        identity: See `cluster.identities`.
    """
    mask = prefix_cache.shape[0] - 1
    tag = _tag_of(identity)
    i = _slot_of(tag, mask)
    while prefix_cache[i].block >= 0:
        if prefix_cache[i].tag == tag and blocks[prefix_cache[i].block].identity == identity:
            return prefix_cache[i].block
        i = (i + 1) & mask
    return -1


@inlined
def insert(prefix_cache: Records, identity: int, block: int) -> None:
    """Note which block has an identity; of several, `find_block` returns the first noted."""
    mask = prefix_cache.shape[0] - 1
    tag = _tag_of(identity)
    i = _slot_of(tag, mask)
    while prefix_cache[i].block >= 0:
        i = (i + 1) & mask
    prefix_cache[i].tag = tag
    prefix_cache[i].block = block


@inlined
def forget(prefix_cache: Records, blocks: Records, block: int) -> bool:
    """Delete a block's entry; later ones of its probe run move back in order, leaving no marks.

    Returns:
        Whether no other block has its identity.
    """
    mask = prefix_cache.shape[0] - 1
    identity = blocks[block].identity
    tag = _tag_of(identity)
    last = True
    i = _slot_of(tag, mask)
    while prefix_cache[i].block != block:
        if prefix_cache[i].tag == tag and blocks[prefix_cache[i].block].identity == identity:
            last = False
        i = (i + 1) & mask
    j = i
    while True:
        j = (j + 1) & mask
        if prefix_cache[j].block < 0:
            break
        if prefix_cache[j].tag == tag and blocks[prefix_cache[j].block].identity == identity:
            last = False
        home = _slot_of(prefix_cache[j].tag, mask)
        if ((j - home) & mask) >= ((j - i) & mask):
            prefix_cache[i].tag = prefix_cache[j].tag
            prefix_cache[i].block = prefix_cache[j].block
            i = j
    prefix_cache[i].block = -1
    return last


@inlined
def take(blocks: Records, prefix_cache: Records, cached_on: IntArray, r: int) -> int:
    """Take the least recently used free block of replica `r`; it loses its identity."""
    end = blocks.shape[0] - 1
    block = blocks[end].after
    blocks[end].after = blocks[block].after
    blocks[blocks[block].after].before = end
    identity = blocks[block].identity
    if identity != 0:
        if forget(prefix_cache, blocks, block) and identity > 0:
            cached_on[identity, r >> 6] &= ~(1 << (r & 63))
        blocks[block].identity = 0
    blocks[block].holders = 1
    return block


@inlined
def set_free(blocks: Records, block: int) -> None:
    """Put a block that nobody has any more into the free list.

    To its end; but to its front if the block has no identity, as it can serve nobody.
    """
    end = blocks.shape[0] - 1
    before = blocks[end].before if blocks[block].identity != 0 else end
    after = blocks[before].after
    blocks[before].after = block
    blocks[block].before = before
    blocks[block].after = after
    blocks[after].before = block


@inlined
def unlink(blocks: Records, block: int) -> None:
    """Take a block out of the free list; it keeps its identity."""
    blocks[blocks[block].before].after = blocks[block].after
    blocks[blocks[block].after].before = blocks[block].before
