"""A histogram with fixed bounds, as Prometheus counts them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts values by bound.

    Args:
        bounds: Upper bounds, ascending; values above the last are counted too.

    Attributes:
        bounds: As given.
        counts: Values within each bound and above the one before; the last: above all.
        total: Sum of the values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def quantile(self, q: float) -> float:
        """Return the bound that at least a share `q` of the values is within; 0 of none."""
        need, seen = q * self.count, 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            seen += count
            if seen >= need:
                return bound if seen else 0.0
        return float("inf")
