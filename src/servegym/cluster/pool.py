"""The KV blocks of a replica: a free list by last use, and which of them has which identity."""

from __future__ import annotations

import numpy as np

from servegym.cluster.jit import inlined
from servegym.cluster.rng import mix64
from servegym.cluster.state import Records


@inlined
def _slot_of(identity: int, mask: int) -> int:
    return np.int64(mix64(np.uint64(identity)) & np.uint64(mask))  # type: ignore[return-value]


@inlined
def find_block(known: Records, identity: int) -> int:
    """Return the block with this identity, or -1.

    Args:
        known: `State.known[e, r]`; callers look it up before their loops.
        identity: See `rng.block_identity`.
    """
    mask = known.shape[0] - 1
    i = _slot_of(identity, mask)
    while known[i].identity != 0:
        if known[i].identity == identity:
            return known[i].block
        i = (i + 1) & mask
    return -1


@inlined
def insert(known: Records, identity: int, block: int) -> None:
    """Note which block has an identity; of several, `find_block` returns the first noted."""
    mask = known.shape[0] - 1
    i = _slot_of(identity, mask)
    while known[i].identity != 0:
        i = (i + 1) & mask
    known[i].identity = identity
    known[i].block = block


@inlined
def forget(known: Records, identity: int, block: int) -> None:
    """Delete a block's entry; later ones of its probe run move back in order, leaving no marks."""
    mask = known.shape[0] - 1
    i = _slot_of(identity, mask)
    while known[i].identity != identity or known[i].block != block:
        i = (i + 1) & mask
    j = i
    while True:
        j = (j + 1) & mask
        if known[j].identity == 0:
            break
        home = _slot_of(known[j].identity, mask)
        if ((j - home) & mask) >= ((j - i) & mask):
            known[i].identity = known[j].identity
            known[i].block = known[j].block
            i = j
    known[i].identity = 0


@inlined
def take(blocks: Records, known: Records) -> int:
    """Take the least recently used free block; it loses its identity."""
    end = blocks.shape[0] - 1
    block = blocks[end].after
    blocks[end].after = blocks[block].after
    blocks[blocks[block].after].before = end
    if blocks[block].identity != 0:
        forget(known, blocks[block].identity, block)
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
