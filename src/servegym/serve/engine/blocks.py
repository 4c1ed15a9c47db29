"""KV blocks of a live replica: holders, identities, and free blocks by last use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Block:
    """One KV block that is held, or free with a content that may be used again."""

    __slots__ = ("holders", "identity")

    def __init__(self) -> None:
        self.holders = 1
        self.identity: int | None = None


class BlockPool:
    """The blocks of a replica, by the rules of docs/simulator.md.

    Free blocks without identity all stand before those with one and nobody can tell them apart,
    so they are only counted.

    Args:
        num_blocks: Blocks in all.
        caching: Whether blocks keep their content for others.
    """

    def __init__(self, num_blocks: int, caching: bool) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self._blank = num_blocks
        self._cached: OrderedDict[Block, None] = OrderedDict()
        self._known: dict[int, list[Block]] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return self._blank + len(self._cached)

    @property
    def usage(self) -> float:
        """Share of blocks that are held."""
        return 1.0 - self.free / self.num_blocks

    def take(self, count: int) -> list[Block]:
        """Take blocks, the least recently used first; there must be as many."""
        for _ in range(count - self._blank):
            self._forget(self._cached.popitem(last=False)[0])
            self._blank += 1
        self._blank -= count
        return [Block() for _ in range(count)]

    def _forget(self, block: Block) -> None:
        assert block.identity is not None
        same = self._known[block.identity]
        same.remove(block)
        if not same:
            del self._known[block.identity]

    def prefix(self, identity: Callable[[int], int], limit: int) -> list[Block]:
        """Find the blocks of the longest cached prefix, at most `limit` of them."""
        found: list[Block] = []
        if self.caching:
            for j in range(limit):
                same = self._known.get(identity(j))
                if same is None:
                    break
                found.append(same[0])
        return found

    def unheld(self, blocks: list[Block]) -> int:
        """Count the blocks that nobody holds."""
        return sum(block.holders == 0 for block in blocks)

    def hold(self, blocks: list[Block]) -> None:
        """Add a holder to each cached block."""
        for block in blocks:
            if block.holders == 0:
                del self._cached[block]
            block.holders += 1

    def name(
        self, blocks: list[Block], identity: Callable[[int], int], first: int, end: int
    ) -> None:
        """Give blocks `first..end-1` of a request their identities; others may have the same."""
        if self.caching:
            for j in range(first, end):
                blocks[j].identity = identity(j)
                self._known.setdefault(identity(j), []).append(blocks[j])

    def release(self, blocks: list[Block]) -> None:
        """Take one holder off each block, the last block first."""
        for block in reversed(blocks):
            block.holders -= 1
            if block.holders == 0:
                if block.identity is None:
                    self._blank += 1
                else:
                    self._cached[block] = None
