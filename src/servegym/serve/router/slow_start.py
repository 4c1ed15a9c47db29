"""Newcomers warm up: the load that they may have grows over a while.

A replica that has just come up is the emptiest of all, and whoever goes by load would send it
every request until it has as many as the others: prompts that are computed all at once, on an
engine whose caches are cold. Envoy scales the weight of newcomers up (its docs, "Slow start mode");
policies here have no weights, and what they see must be true. So a newcomer is left out of the
choice while it has more than its share of what the others have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servegym.policy.contract import OUTSTANDING_REQUESTS, RELATIVE_SPEED
from servegym.serve.state import LiveState
from servegym.typing import BoolArray


class SlowStart:
    """Knows who is new, and how much each may have.

    Args:
        duration_s: How long one is new; 0: none is.
        state: Of the fleet.
        clock: Seconds that never go back.
    """

    def __init__(self, duration_s: float, state: LiveState, clock: Callable[[], float]) -> None:
        self._duration_s = duration_s
        self._state = state
        self._clock = clock
        self._since_s: dict[int, float] = {}  # of those that are new, by slot

    def begin(self, replica: int) -> None:
        """A replica has come up."""
        if self._duration_s > 0.0:
            self._since_s[replica] = self._clock()

    def forget(self, replica: int) -> None:
        """A replica has gone down, or altogether."""
        self._since_s.pop(replica, None)

    def share(self, replica: int) -> float:
        """Return the share of a full load that a replica may have, 0 to 1."""
        since_s = self._since_s.get(replica)
        if since_s is None:
            return 1.0
        return min(1.0, (self._clock() - since_s) / self._duration_s)

    def held_back(self, allowed: BoolArray) -> list[int]:
        """Return the newcomers that should get no request now, if another can.

        A newcomer may have as many requests as the others have on average, at its speed, times
        the share of its time that is over, and one in any case.

        Args:
            allowed: Replicas in question, `bool[W]`.
        """
        if not self._since_s:
            return []
        for replica in [r for r in self._since_s if self.share(r) >= 1.0]:
            self.forget(replica)
        if not self._since_s:
            return []
        warm = allowed.copy()
        warm[list(self._since_s)] = False
        if not warm.any():
            return []
        outstanding, speed = self._state.replicas[[OUTSTANDING_REQUESTS, RELATIVE_SPEED]]
        full = np.sum(outstanding[warm]) / np.sum(speed[warm])
        return [
            r
            for r in self._since_s
            if allowed[r] and outstanding[r] >= max(1.0, self.share(r) * full * speed[r])
        ]
