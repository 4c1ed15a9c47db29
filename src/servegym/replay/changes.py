"""Where in a log replicas have changed: windows, cuts between them, and their exact times."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from servegym.replay.conditions import Observed
from servegym.replay.fit import Fit
from servegym.replay.forced import Factors, Forced
from servegym.replay.terms import TERMS
from servegym.typing import BoolArray, FloatArray, IntArray

#: Requests of a replica that a window needs, and how many windows there may be.
_WINDOW_REQUESTS = 40
MIN_WINDOWS, _MAX_WINDOWS = 4, 16
#: Windows that a replica stays as it is, or the log does not tell a change from an outlier.
_LEAST_WINDOWS = 2
#: Chance of seeing a change, or a drift, where there is none: in the whole log.
FALSE_ALARM = 0.01
#: Requests of a replica below which nothing is said of it.
MIN_REQUESTS = 30


class Layout(NamedTuple):
    """Windows between all changes, and which stretch of a replica each is in.

    Attributes:
        edges_s: Where the windows meet, `float64[W - 1]`.
        stretch: Of each replica, by window, `int64[W, R]`.
    """

    edges_s: FloatArray
    stretch: IntArray


def window_edges(forced: Forced, observed: Observed) -> FloatArray:
    """Divide a log into windows with enough requests of every replica.

    Args:
        forced: Dispatches.
        observed: What happened.

    Returns:
        Seconds at which one window ends and the next begins, `float64[W - 1]`; none in a short log.
    """
    counts = np.bincount(observed.replica[observed.usable], minlength=len(forced.fleet.names))
    enough = counts[counts >= MIN_REQUESTS]
    num = int(np.median(enough) // _WINDOW_REQUESTS) if len(enough) else 0
    if num < MIN_WINDOWS:
        return np.zeros(0)
    num = min(num, _MAX_WINDOWS)
    return np.linspace(0.0, forced.span_s, num + 1)[1:-1]


def scattered(windows: Fit) -> FloatArray:
    """Standard errors of windows, at least what neighbours scatter by, `float64[W, R, P]`."""
    steps = np.diff(windows.values, axis=0)
    local = 1.4826 * np.median(np.abs(steps), axis=0) / math.sqrt(2.0)
    usual = np.maximum(np.median(windows.count, axis=0), 1.0)
    fewer = np.sqrt(usual / np.maximum(windows.count, 1.0))[:, :, None]
    return np.asarray(np.maximum(np.maximum(windows.sigma(), local * fewer), 1e-4))


def changed_windows(windows: Fit, tolerance: float) -> list[list[int]]:
    """Return for each replica the windows that begin with a change."""
    num_windows, num_replicas, size = windows.values.shape
    sigma = scattered(windows)
    tests = max(1, (num_windows - 1) * num_replicas * size)
    least_z = NormalDist().inv_cdf(1.0 - 0.5 * FALSE_ALARM / tests)
    found = []
    for r in range(num_replicas):
        there = windows.count[:, r] > 0
        found.append(
            sorted(
                _split(windows.values[:, r], sigma[:, r], there, 0, num_windows, least_z, tolerance)
            )
        )
    return found


def _split(
    values: FloatArray,
    sigma: FloatArray,
    there: BoolArray,
    first: int,
    last: int,
    least_z: float,
    tolerance: float,
) -> list[int]:
    """Cut where the means before and after differ most surely, and look again on both sides."""
    best_z, cut = least_z, -1
    weight = there[:, None] / sigma**2
    for at in range(first + _LEAST_WINDOWS, last - _LEAST_WINDOWS + 1):
        sides = [slice(first, at), slice(at, last)]
        sums = [weight[side].sum(axis=0) for side in sides]
        if not all((one > 0).all() for one in sums):
            continue
        means = [
            (weight[s] * values[s]).sum(axis=0) / one for s, one in zip(sides, sums, strict=True)
        ]
        # windows that scatter more around these means than they should say less
        off = [weight[s] * (values[s] - mean) ** 2 for s, mean in zip(sides, means, strict=True)]
        spread = np.concatenate(off).sum(axis=0) / max(1, last - first - 2)
        gap = np.abs(means[1] - means[0])
        error = np.sqrt((1.0 / sums[0] + 1.0 / sums[1]) * np.maximum(1.0, spread))
        z = float(np.where(gap > tolerance, gap / error, 0.0).max())
        if z > best_z:
            best_z, cut = z, at
    if cut < 0:
        return []
    left = _split(values, sigma, there, first, cut, least_z, tolerance)
    return [*left, cut, *_split(values, sigma, there, cut, last, least_z, tolerance)]


def refined(
    forced: Forced, observed: Observed, windows: Fit, whole: Fit, changes: list[list[int]]
) -> list[list[float]]:
    """Move each change to where, within a window, the simulation agrees best around it."""
    width_s = float(windows.edges_s[0])
    shifts = np.linspace(-1.0, 1.0, 13) * width_s
    times = [[float(windows.edges_s[at - 1]) for at in mine] for mine in changes]
    between = means_between(windows, changes)
    variants = []
    for shift in shifts.tolist():
        moved = layout([[time + shift for time in mine] for mine in times])
        values = np.ones((len(moved.edges_s) + 1, len(times), len(TERMS)))
        for w, row in enumerate(moved.stretch.tolist()):
            for r, j in enumerate(row):
                decode, prefill = np.exp(between[r][j])
                values[w, r] = [decode, decode, prefill]
        variants.append(Factors(moved.edges_s, values))
    extra_s = whole.request_s(observed.at_s, observed.replica)
    off = []
    for made in forced.play(variants):
        with np.errstate(divide="ignore", invalid="ignore"):
            tpot_s = (made.e2e_s - made.ttft_s) / observed.gaps
            logs = np.log(np.stack((np.maximum(made.ttft_s + extra_s, 1e-6), tpot_s)))
        weight = observed.weight
        off.append(np.where(weight > 0, weight * np.abs(observed.logs - logs), 0.0).sum(axis=0))
    found = []
    for r, mine in enumerate(times):
        row = []
        for time in mine:
            near = (observed.replica == r) & (np.abs(observed.at_s - time) < 1.5 * width_s)
            best = int(np.argmin([one[near].sum() for one in off]))
            row.append(time + float(shifts[best]))
        found.append(sorted(row))
    return found


def means_between(windows: Fit, changes: list[list[int]]) -> list[list[FloatArray]]:
    """Average the parameters of each replica's windows between its changes."""
    sigma = scattered(windows)
    found = []
    for r, mine in enumerate(changes):
        cuts = [0, *mine, len(windows.values)]
        found.append(
            [
                np.average(windows.values[a:b, r], axis=0, weights=1.0 / sigma[a:b, r] ** 2)
                for a, b in pairwise(cuts)
            ]
        )
    return found


def layout(times: list[list[float]]) -> Layout:
    """Lay the stretches of all replicas over each other; `times` are each one's changes, s."""
    edges = np.unique(np.array([t for mine in times for t in mine]))
    begins = np.concatenate(([-np.inf], edges))
    stretch = np.stack(
        [np.searchsorted(np.array(mine), begins, side="right") for mine in times], axis=1
    )
    return Layout(edges, stretch.astype(np.int64))


def middles(windows: Fit) -> FloatArray:
    """Seconds in the middle of each window, `float64[W]`."""
    width_s = float(windows.edges_s[0])
    return np.asarray((np.arange(len(windows.values)) + 0.5) * width_s)
