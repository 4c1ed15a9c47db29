"""The time that a run may take."""

from __future__ import annotations

import math
import time


class Budget:
    """Minutes of a run, over all its sittings, from when it is prepared and compiled.

    Attributes:
        spent_s: Seconds spent up to now.
    """

    def __init__(self, max_minutes: float) -> None:
        self._limit_s = 60.0 * max_minutes
        self._before_s = 0.0
        self._begin_s = math.nan

    def start(self, spent_s: float) -> None:
        """Start the clock; earlier sittings took `spent_s`."""
        self._before_s, self._begin_s = spent_s, time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds spent so far, over all sittings."""
        if math.isnan(self._begin_s):
            return self._before_s
        return self._before_s + time.monotonic() - self._begin_s

    def share(self) -> float:
        """Return the share of the time that is over."""
        return self.spent_s / self._limit_s

    def fits(self, seconds: float, share: float = 1.0) -> bool:
        """Whether so many more seconds fit into a share of the time."""
        return self.spent_s + seconds <= share * self._limit_s
