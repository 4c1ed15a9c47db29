"""The KV blocks of a replica: a free list by last use, and which of them has which identity."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.state import Records
from servegym.typing import Int32Array, IntArray


@inlined
def _place_of(identity: int, mask: int) -> int:
    """Where in a map an identity belongs: the blocks of a text lie side by side.

    Shared texts are numbered, so that they lie beside each other, too; what belongs to one request,
    and what a live engine names, begins somewhere.
    """
    begin = (((identity >> 32) & 0x7FFFFFFF) * 0x9E3779B1) >> 16
    return ((identity & 0xFFFFFFFF) + begin) & mask


@inlined
def find_block(cache: Int32Array, blocks: Records, identity: int) -> int:
    """Return the block with this identity, or -1.

    Args:
        cache: `State.prefix_cache[e, r]`; callers look it up before their loops.
        blocks: `State.block[e, r]`, or those of a tier, whose map it is.
        identity: See `cluster.identities`.
    """
    block = cache[_place_of(identity, cache.shape[0] - 1)]
    while block >= 0 and blocks[block].identity != identity:
        block = blocks[block].behind
    return block


@inlined
def insert(cache: Int32Array, blocks: Records, identity: int, block: int) -> None:
    """Give a block its identity; of several with the same, `find_block` returns the first."""
    place = _place_of(identity, cache.shape[0] - 1)
    blocks[block].identity = identity
    blocks[block].behind = -1
    other = cache[place]
    if other < 0:
        cache[place] = block
        return
    while blocks[other].behind >= 0:
        other = blocks[other].behind
    blocks[other].behind = block


@inlined
def forget(cache: Int32Array, blocks: Records, block: int) -> bool:
    """Take its identity from a block.

    Returns:
        Whether no other block has the same.
    """
    identity = blocks[block].identity
    place = _place_of(identity, cache.shape[0] - 1)
    blocks[block].identity = 0
    behind = blocks[block].behind
    other = cache[place]
    if other == block:
        cache[place] = behind
        other = behind
    last = True
    while other >= 0:
        last &= blocks[other].identity != identity
        following = blocks[other].behind
        if following == block:
            blocks[other].behind = behind
            following = behind
        other = following
    return last


@inlined
def take(
    blocks: Records,
    cache: Int32Array,
    cached_on: IntArray,
    r: int,
    row: Int32Array,
    first: int,
    stop: int,
) -> None:
    """Take the least recently used free blocks of a replica; they lose their identities.

    Args:
        blocks: `State.block[e, r]`.
        cache: `State.prefix_cache[e, r]`.
        cached_on: `State.cached_on[e]`.
        r: Replica.
        row: Where their numbers go.
        first: First place of it that is written.
        stop: The one behind the last.
    """
    end = blocks.shape[0] - 1
    block = blocks[end].after
    for j in range(first, stop):
        row[j] = block
        blocks[block].holders = 1
        identity = blocks[block].identity
        if identity != 0 and forget(cache, blocks, block) and identity > 0:
            cached_on[identity, r >> 6] &= ~(1 << (r & 63))
        block = blocks[block].after
    blocks[end].after = block
    blocks[block].before = end


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
