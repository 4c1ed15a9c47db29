"""How late the event loop is: whatever holds it up holds up every stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

#: Bounds for a histogram of lags, seconds.
LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
#: Between two looks: often enough to meet what lasts as long, and 0.01 % of a core.
_INTERVAL_S = 0.1


class LoopLag:
    """Asks to be woken again and again, and tells how much later that is than asked.

    Args:
        tell: Called with each lag, seconds.
    """

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop; anew if it has begun."""
        self.stop()
        loop = asyncio.get_running_loop()
        due_s = loop.time() + _INTERVAL_S
        self._timer = loop.call_at(due_s, self._look, loop, due_s)

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        now_s = loop.time()
        self._tell(max(0.0, now_s - due_s))
        next_s = now_s + _INTERVAL_S
        self._timer = loop.call_at(next_s, self._look, loop, next_s)
