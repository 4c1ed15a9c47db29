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


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    num_pairs: int


class Share(NamedTuple):
    """Share of the way from a reference to a bound, with its 95 % bootstrap interval."""

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
    mean, low, high, n = _mean_with_interval(np.log(metric[usable] / reference[usable]))
    return Ratio(float(np.exp(mean)), float(np.exp(low)), float(np.exp(high)), n)


def paired_difference(metric: FloatArray, reference: FloatArray) -> Difference:
    """Compare a share seed by seed; one that is 0 has no ratio, but a difference.

    Args:
        metric: Of the policy, `float64[seeds]`.
        reference: Of the reference policy on the same seeds, `float64[seeds]`.

    Returns:
        `metric - reference`. With fewer than two usable pairs the interval is infinite.
    """
    gaps = metric - reference
    return Difference(*_mean_with_interval(gaps[~np.isnan(gaps)]))


def headroom_share(
    metric: FloatArray, reference: FloatArray, bound: FloatArray, sign: int = 1
) -> Share:
    """Say how much of the way from a reference to a bound a policy has gone.

    Args:
        metric: Of the policy, `float64[seeds]`.
        reference: Of the reference policy on the same seeds, `float64[seeds]`.
        bound: Of the bound on the same seeds, `float64[seeds]`.
        sign: 1 if lower is better, -1 if higher is.

    Returns:
        Mean of `reference - metric` over that of `reference - bound`: 0 is the reference, 1 the
        bound. NaN if the bound is not better than the reference.
    """
    gained, there = sign * (reference - metric), sign * (reference - bound)
    known = ~np.isnan(gained) & ~np.isnan(there)
    gained, there = gained[known], there[known]
    n = len(gained)
    if n == 0 or there.sum() <= 0:
        return Share(np.nan, np.nan, np.nan, n)
    value = float(gained.sum() / there.sum())
    if n == 1:
        return Share(value, -np.inf, np.inf, 1)
    rows = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    ways, shares = there[rows].sum(1), gained[rows].sum(1)
    low, high = np.percentile(shares[ways > 0] / ways[ways > 0], (2.5, 97.5))
    return Share(value, float(low), float(high), n)


def with_interval(found: Ratio | Difference | Share, form: str = ".3f", factor: float = 1.0) -> str:
    """Return a comparison as text; a single pair has no interval.

    Args:
        found: The comparison.
        form: Of each number.
        factor: On each number.
    """
    text = f"{factor * found.value:{form}}"
    if found.num_pairs < 2:
        return text
    return f"{text} [{factor * found.low:{form}}, {factor * found.high:{form}}]"


def _mean_with_interval(values: FloatArray) -> tuple[float, float, float, int]:
    """Mean of independent values, its 95 % bootstrap interval, and how many they are."""
    n = len(values)
    if n == 0:
        return np.nan, np.nan, np.nan, 0
    if n == 1:
        return float(values[0]), -np.inf, np.inf, 1
    rows = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(values[rows].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high), n
