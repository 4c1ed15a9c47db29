"""The KV blocks of a replica: a free list by last use, and which of them has which identity."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import Records


@inlined
def _slot_of(identity: int, mask: int) -> int:
    """Where to look first: blocks in a row of one text lie side by side, see `block_identity`."""
    return (identity >> 1) & mask


@inlined
def find_block(prefix_cache: Records, identity: int) -> int:
    """Return the block with this identity, or -1.

    Args:
        prefix_cache: `State.prefix_cache[e, r]`; callers look it up before their loops.
        identity: See `rng.block_identity`.
    """
    mask = prefix_cache.shape[0] - 1
    i = _slot_of(identity, mask)
    while prefix_cache[i].identity != 0:
        if prefix_cache[i].identity == identity:
            return prefix_cache[i].block
        i = (i + 1) & mask
    return -1


@inlined
def insert(prefix_cache: Records, identity: int, block: int) -> None:
    """Note which block has an identity; of several, `find_block` returns the first noted."""
    mask = prefix_cache.shape[0] - 1
    i = _slot_of(identity, mask)
    while prefix_cache[i].identity != 0:
        i = (i + 1) & mask
    prefix_cache[i].identity = identity
    prefix_cache[i].block = block


@inlined
def forget(prefix_cache: Records, identity: int, block: int) -> None:
    """Delete a block's entry; later ones of its probe run move back in order, leaving no marks."""
    mask = prefix_cache.shape[0] - 1
    i = _slot_of(identity, mask)
    while prefix_cache[i].identity != identity or prefix_cache[i].block != block:
        i = (i + 1) & mask
    j = i
    while True:
        j = (j + 1) & mask
        if prefix_cache[j].identity == 0:
            break
        home = _slot_of(prefix_cache[j].identity, mask)
        if ((j - home) & mask) >= ((j - i) & mask):
            prefix_cache[i].identity = prefix_cache[j].identity
            prefix_cache[i].block = prefix_cache[j].block
            i = j
    prefix_cache[i].identity = 0


@inlined
def take(blocks: Records, prefix_cache: Records) -> int:
    """Take the least recently used free block; it loses its identity."""
    end = blocks.shape[0] - 1
    block = blocks[end].after
    blocks[end].after = blocks[block].after
    blocks[blocks[block].after].before = end
    if blocks[block].identity != 0:
        forget(prefix_cache, blocks[block].identity, block)
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
