"""Requests that wait at the router for a replica with room: by priority, then by arrival.

Those for different models stand in different lines. Whoever goes tells the next; nobody who comes
later goes first, but those of a higher priority do.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in its line.

    Attributes:
        priority: Higher goes first.
        arrival_s: Of equal ones the earlier.
        model: What it is for.
        turn: Set when it may be its turn; there is none before it stands.
        stands: Whether it stands in its line.
    """

    priority: int
    arrival_s: float
    model: str
    turn: asyncio.Event | None = None
    stands: bool = False

    def __lt__(self, other: Waiting) -> bool:
        """Whether it goes before another."""
        return (-self.priority, self.arrival_s) < (-other.priority, other.arrival_s)


class Line:
    """All lines of a router."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Waiting]] = {}

    def may_go(self, one: Waiting) -> bool:
        """Whether nobody is before it."""
        line = self._lines.get(one.model)
        return not line or line[0] is one or one < line[0]

    async def wait(self, one: Waiting, seconds: float) -> None:
        """Stand in line until it may be one's turn, and keep the place until `leave`.

        Args:
            one: Who waits.
            seconds: Until it looks for itself, called or not.
        """
        if not one.stands:
            one.stands, one.turn = True, asyncio.Event()
            insort(self._lines.setdefault(one.model, []), one)
        turn = one.turn
        assert turn is not None
        turn.clear()
        try:
            async with asyncio.timeout(seconds):
                await turn.wait()
        except TimeoutError:
            return

    def leave(self, one: Waiting) -> None:
        """It waits no more; the next may have its turn, too. Does nothing the second time."""
        if not one.stands:
            return
        one.stands = False
        line = self._lines[one.model]
        line.remove(one)
        if line:
            _tell(line[0])
        else:
            del self._lines[one.model]

    def call(self) -> None:
        """There may be room somewhere: it is the turn of the first of every line."""
        for line in self._lines.values():
            _tell(line[0])


def _tell(first: Waiting) -> None:
    assert first.turn is not None
    first.turn.set()
