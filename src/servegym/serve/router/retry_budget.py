"""How many requests may be tried again: retries must not double the load of a fleet in trouble."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

#: Seconds that the budget looks back, in as many parts.
_WINDOW_S = 10


class RetryBudget:
    """Counts requests and retries of the last seconds.

    Args:
        share: Retries allowed, as a share of the requests.
        reserve: So many more.
        clock: Seconds that never go back.

    Attributes:
        num_denied: Retries that were not allowed.
    """

    def __init__(self, share: float, reserve: int, clock: Callable[[], float]) -> None:
        self.num_denied = 0
        self._share = share
        self._reserve = reserve
        self._clock = clock
        self._parts: deque[list[int]] = deque()  # second, requests, retries

    def request(self) -> None:
        """Count one more request, of which a share may be retried."""
        self._part()[1] += 1

    def take(self, in_progress: int) -> bool:
        """Count a retry if it is allowed.

        Args:
            in_progress: Requests in the router: a burst of them may be older than the window.
        """
        part = self._part()
        requests = sum(p[1] for p in self._parts)
        retries = sum(p[2] for p in self._parts)
        if retries >= self._reserve + self._share * max(requests, in_progress):
            self.num_denied += 1
            return False
        part[2] += 1
        return True

    def _part(self) -> list[int]:
        second = int(self._clock())
        parts = self._parts
        if not parts or parts[-1][0] != second:
            parts.append([second, 0, 0])
            while parts[0][0] <= second - _WINDOW_S:
                parts.popleft()
        return parts[-1]
