"""Paired comparison: the same requests under two policies."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.typing import FloatArray

RESAMPLES = 2000


class Ratio(NamedTuple):
    """Geometric mean of paired ratios with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    num_pairs: int


def paired_ratio(metric: FloatArray, reference: FloatArray) -> Ratio:
    """Compare a metric seed by seed.

    Args:
        metric: Of the policy, `float64[seeds]`.
        reference: Of the reference policy on the same seeds, `float64[seeds]`.

    Returns:
        `metric / reference`; below 1 the policy's is smaller. With fewer than two usable pairs
        the interval is infinite.
    """
    usable = (metric > 0) & (reference > 0)
    logs = np.log(metric[usable] / reference[usable])
    n = len(logs)
    if n == 0:
        return Ratio(float("nan"), float("nan"), float("nan"), 0)
    if n == 1:
        return Ratio(float(np.exp(logs[0])), 0.0, float("inf"), 1)
    rows = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(logs[rows].mean(1), (2.5, 97.5))
    return Ratio(float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high)), n)
