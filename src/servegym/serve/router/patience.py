"""A deadline that is moved with every piece of an answer, at next to no cost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Patience:
    """Raises `TimeoutError` in its block when a deadline has passed.

    `asyncio.timeout` sets a timer anew at each change; here the timer looks whether the deadline
    has been moved.

    Args:
        clock: Seconds that never go back.
        shortest_s: The deadline is never set to less than so many seconds from now.

    Attributes:
        due_s: The deadline; may be set at any time.
    """

    __slots__ = ("_clock", "_handle", "_shortest_s", "_timeout", "due_s")

    def __init__(self, clock: Callable[[], float], shortest_s: float) -> None:
        self.due_s = math.inf
        self._clock = clock
        self._shortest_s = shortest_s
        self._timeout = asyncio.timeout(None)
        self._handle: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._look()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        left_s = self.due_s - self._clock()
        if left_s <= 0.0:
            self._handle = None
            self._timeout.reschedule(loop.time())
        else:
            self._handle = loop.call_later(min(left_s, self._shortest_s), self._look)
