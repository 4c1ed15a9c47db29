"""A deadline that is moved with every piece of an answer, at next to no cost."""

from __future__ import annotations

import math
from collections.abc import Callable

from servegym.serve.router.timers import Timers

#: Until whoever has got what he waited for has been woken.
_AGAIN_S = 0.001


class Patience:
    """Calls a function when a deadline has passed.

    A timer set anew at each change would cost more than the change; here the timer looks whether
    the deadline has been moved. Where it has not, it looks once more: on a machine without a free
    processor what was waited for may have been there for long, and who waits not yet woken.

    Args:
        timers: By which it looks.
        clock: Seconds that never go back.
        shortest_s: The deadline is never set to less than so many seconds from now.
        expired: Called once, unless `end` was called before.

    Attributes:
        due_s: The deadline; may be set at any time.
    """

    __slots__ = ("_clock", "_expired", "_is_over", "_shortest_s", "_timer", "_timers", "due_s")

    def __init__(
        self,
        timers: Timers,
        clock: Callable[[], float],
        shortest_s: float,
        expired: Callable[[], None],
    ) -> None:
        self.due_s = math.inf
        self._clock = clock
        self._shortest_s = shortest_s
        self._expired = expired
        self._is_over = False
        self._timers = timers
        self._timer = timers.after(shortest_s, self._look)

    def end(self) -> None:
        """The deadline no longer matters."""
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self.due_s - self._clock()
        if left_s > 0.0:
            self._is_over = False
            self._timer = self._timers.after(min(left_s, self._shortest_s), self._look)
        elif not self._is_over:
            self._is_over = True
            self._timer = self._timers.after(_AGAIN_S, self._look)
        else:
            self._expired()
