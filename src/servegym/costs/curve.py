"""Monotonic curves and surfaces through sampled times, linear in logarithms."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import exp, log

import numpy as np

from servegym.typing import FloatArray


@dataclass(frozen=True)
class Surface:
    """Seconds over two sizes: bilinear in the logarithms, growing in both or in the second.

    Measured times are not quite monotonic; the running maximum is taken, so that more work never
    takes less time. Beyond the knots the last slope goes on.

    Attributes:
        x: Ascending knots, `float64[X]`.
        y: Ascending knots, `float64[Y]`.
        log_s: Logarithms of seconds, `float64[X, Y]`.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    log_s: list[list[float]]

    @classmethod
    def through(
        cls, x: FloatArray, y: FloatArray, seconds: FloatArray, *, growing_x: bool = True
    ) -> Surface:
        """Make the times monotonic and keep their logarithms.

        Args:
            x: Ascending knots, `float64[X]`.
            y: Ascending knots, `float64[Y]`.
            seconds: At all of them, `float64[X, Y]`.
            growing_x: Whether more of the first size is more work.
        """
        grown = np.maximum.accumulate(seconds, axis=0) if growing_x else seconds
        grown = np.maximum.accumulate(grown, axis=1)
        return cls(tuple(np.log(x).tolist()), tuple(np.log(y).tolist()), np.log(grown).tolist())

    def __call__(self, x: float, y: float) -> float:
        """Seconds at a point."""
        i, u = _locate(self.x, x)
        j, v = _locate(self.y, y)
        a, b = self.log_s[i], self.log_s[i + 1]
        low = a[j] + v * (a[j + 1] - a[j])
        high = b[j] + v * (b[j + 1] - b[j])
        return exp(low + u * (high - low))


def _locate(knots: tuple[float, ...], value: float) -> tuple[int, float]:
    z = log(max(value, 1e-12))
    i = min(max(bisect_right(knots, z) - 1, 0), len(knots) - 2)
    return i, max((z - knots[i]) / (knots[i + 1] - knots[i]), 0.0)
