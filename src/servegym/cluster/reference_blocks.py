"""The plain KV blocks of a replica, and the ended turns that keep some of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: What is in a block: whether its text is of one request alone, which text, and which block of it.
Identity = tuple[str, int, int]


@dataclass
class Retained:
    """A turn that has ended and keeps blocks for the next one."""

    turn: int
    blocks: list[int]
    until_s: float  # infinite once the next turn waits
    order: int
    decided: bool = True


class BlockPool:
    """KV blocks of a replica: holders, identities, and a free list by last use."""

    def __init__(
        self, num_blocks: int, caching: bool, give_way: Callable[[int], None] | None = None
    ) -> None:
        self.caching, self.give_way = caching, give_way
        self.free = list(range(num_blocks))
        self.holders = dict.fromkeys(range(num_blocks), 0)
        self.identity: dict[int, Identity] = {}
        self.where: dict[Identity, list[int]] = {}
        self.retained: list[Retained] = []
        self._num_ordered = 0

    @property
    def kept(self) -> set[int]:
        """Blocks that ended turns keep."""
        return {block for one in self.retained for block in one.blocks}

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return len(self.free) + sum(self.holders[block] == 0 for block in self.kept)

    def take(self) -> int:
        """Take the least recently used free block; kept ones only when there is no other."""
        while not self.free:
            one = min(self.retained, key=lambda one: (one.until_s, one.order))
            if self.give_way is not None and not one.decided:
                self.give_way(one.turn)
            self.let_go(one)
        block = self.free.pop(0)
        if block in self.identity:
            self.where[self.identity.pop(block)].remove(block)
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Add a holder to a cached block."""
        if self.holders[block] == 0 and block not in self.kept:
            self.free.remove(block)
        self.holders[block] += 1

    def name(self, block: int, identity: Identity) -> None:
        """Give a filled block its identity; others may have the same."""
        if self.caching:
            self.where.setdefault(identity, []).append(block)
            self.identity[block] = identity

    def release(self, blocks: list[int]) -> None:
        """Take one holder off each block, last block first; those without identity go first."""
        nameless: list[int] = []
        kept = self.kept
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0 and block not in kept:
                (self.free if block in self.identity else nameless).append(block)
        self.free[:0] = nameless

    def retain(self, turn: int, blocks: list[int], until_s: float, *, decided: bool = True) -> None:
        """Keep blocks of a turn that has ended."""
        self.free = [block for block in self.free if block not in blocks]
        self._num_ordered += 1
        self.retained.append(Retained(turn, blocks, until_s, self._num_ordered, decided))

    def undecided(self, turn: int) -> Retained | None:
        """A turn of which nobody has decided yet what becomes of it, if it is here."""
        return next((o for o in self.retained if o.turn == turn and not o.decided), None)

    def keep_until(self, one: Retained, until_s: float) -> None:
        """It is decided that a turn keeps its blocks until a time."""
        self._num_ordered += 1
        one.until_s, one.order, one.decided = until_s, self._num_ordered, True

    def drop(self, one: Retained) -> None:
        """Give back what a turn keeps; it is taken next, the last block first."""
        self.let_go(one)
        for block in one.blocks:
            if block in self.free:
                self.free.remove(block)
                self.free.insert(0, block)

    def expect(self, turn: int) -> None:
        """The turn after this one waits here: its time does not run any more."""
        for one in self.retained:
            if one.turn == turn and one.until_s < math.inf:
                self._num_ordered += 1
                one.until_s, one.order = math.inf, -self._num_ordered

    def expire(self, turn: int) -> None:
        """The time of a turn is over, if it still runs."""
        for one in [o for o in self.retained if o.turn == turn and o.until_s < math.inf]:
            self.let_go(one)

    def let_go(self, one: Retained) -> None:
        """Give back what a turn keeps, last block first."""
        self.retained.remove(one)
        kept = self.kept
        for block in reversed(one.blocks):
            if self.holders[block] == 0 and block not in kept:
                self.free.append(block)

    def let_go_of(self, turn: int) -> None:
        """Give back what a turn keeps, if it does."""
        for one in [o for o in self.retained if o.turn == turn]:
            self.let_go(one)

    def let_all_go(self) -> None:
        """Give back what all turns keep."""
        while self.retained:
            self.let_go(self.retained[0])
