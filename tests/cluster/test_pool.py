"""The map from identities to blocks, and the free list, on a handful of blocks."""

from __future__ import annotations

import numpy as np

from servegym.cluster.pool import find_block, forget, insert, take
from servegym.cluster.state import BLOCK_DTYPE


def made(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Make an empty map of four places, and blocks without identities."""
    return np.full(4, -1, np.int32), np.zeros(count, BLOCK_DTYPE).view(np.recarray)


def test_blocks_of_a_text_lie_side_by_side():
    cache, blocks = made(3)
    for block, identity in enumerate((5, 6, 7)):
        insert(cache, blocks, identity, block)
    assert cache.tolist() == [-1, 0, 1, 2]


def test_what_belongs_to_requests_does_not_begin_at_one_place():
    cache, blocks = made(32)
    for request in range(32):
        insert(cache, blocks, -((request + 1) << 32), request)
    assert (cache >= 0).all()


def test_of_equal_blocks_the_first_is_found_and_then_the_next():
    cache, blocks = made(4)
    for block, identity in enumerate((1, 5, 1, 9)):  # all of them belong in place 1
        insert(cache, blocks, identity, block)
    assert [find_block(cache, blocks, i) for i in (1, 5, 9, 13)] == [0, 1, 3, -1]
    assert not forget(cache, blocks, 0)  # block 2 has the same identity
    assert [find_block(cache, blocks, i) for i in (1, 5, 9)] == [2, 1, 3]
    assert forget(cache, blocks, 2)
    assert [find_block(cache, blocks, i) for i in (1, 5, 9)] == [-1, 1, 3]


def test_the_last_block_with_an_identity_takes_it_along():
    cache, blocks = made(3)
    for block, identity in enumerate((1, 5, 9)):
        insert(cache, blocks, identity, block)
    assert [forget(cache, blocks, block) for block in (1, 0, 2)] == [True, True, True]
    assert cache.tolist() == [-1, -1, -1, -1]
    assert blocks.identity.tolist() == [0, 0, 0]


def test_blocks_are_taken_from_the_front_of_the_free_list_without_their_identities():
    cache, blocks = made(4)  # three, and the end of the list
    for block, (after, before) in enumerate(((2, 3), (3, 2), (1, 0), (0, 1))):  # free: 0, 2, 1
        blocks[block].after, blocks[block].before = after, before
    cached_on = np.zeros((8, 1), np.int64)
    for identity, block in ((7, 2), (6, 1)):
        insert(cache, blocks, identity, block)
        cached_on[identity, 0] = 0b11  # replicas 0 and 1
    row = np.full(4, -1, np.int32)
    take(blocks, cache, cached_on, 1, row, 1, 3)
    assert row.tolist() == [-1, 0, 2, -1]
    assert blocks.holders.tolist() == [1, 0, 1, 0]
    assert cached_on[[6, 7], 0].tolist() == [0b11, 0b01]
    assert [find_block(cache, blocks, i) for i in (6, 7)] == [1, -1]
    assert (blocks[3].after, blocks[1].before) == (1, 3)
