"""Many timers by one of the event loop's.

Nearly every time-out of a request is called off. A timer of uvloop is a handle of libuv's: made,
started, stopped, and closed in a later round of the loop, which takes three times as long.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count

#: Event loops count milliseconds: what is a fraction of one too early looks again.
_STEP_S = 0.001
#: Timers that are never too many.
_FEW = 1024


class Timer:
    """One that has been set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[[], object]) -> None:
        self.function: Callable[[], object] | None = function

    def cancel(self) -> None:
        """Call nothing; does nothing once it has called."""
        self.function = None  # what stands in the heap until its time holds nothing else


class Timers:
    """Calls functions later, in the order they are due; of two at once the one set first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []  # when due, which in order, what
        self._numbers = count()
        self._handle: asyncio.TimerHandle | None = None
        self._look_s = math.inf  # when that looks
        self._limit = _FEW  # a longer heap is rid of what was called off

    def after(self, delay_s: float, function: Callable[[], object]) -> Timer:
        """Call a function once, in so many seconds."""
        due_s = time.monotonic() + delay_s
        timer = Timer(function)
        heappush(self._heap, (due_s, next(self._numbers), timer))
        if len(self._heap) > self._limit:
            self._tidy()
        if due_s < self._look_s:
            self._set(due_s, delay_s)
        return timer

    def _tidy(self) -> None:
        """Forget what was called off: a long time-out would stand here until it is due."""
        self._heap[:] = [entry for entry in self._heap if entry[2].function is not None]
        heapify(self._heap)
        self._limit = max(_FEW, 2 * len(self._heap))

    def _set(self, due_s: float, delay_s: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._look_s = due_s
        self._handle = asyncio.get_running_loop().call_later(max(0.0, delay_s), self._look)

    def _look(self) -> None:
        """Call what is due, and look again when the next one is."""
        self._handle, self._look_s = None, math.inf
        heap, now_s = self._heap, time.monotonic()
        while heap and (heap[0][0] <= now_s or heap[0][2].function is None):
            _, _, timer = heappop(heap)
            function, timer.function = timer.function, None
            if function is None:
                continue
            try:
                function()
            except Exception as error:
                context = {"message": "what a timer calls has failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        if heap and heap[0][0] < self._look_s:
            self._set(heap[0][0], max(_STEP_S, heap[0][0] - now_s))
