"""Which terms of which replica's costs have drifted, by how much and since when."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from servegym.replay.changes import (
    FALSE_ALARM,
    MIN_REQUESTS,
    MIN_WINDOWS,
    changed_windows,
    layout,
    means_between,
    middles,
    refined,
    scattered,
    window_edges,
)
from servegym.replay.conditions import Conditions, Observed, conditions
from servegym.replay.fit import COARSE, FULL, Fit, fit
from servegym.replay.forced import Factors, Forced, Prediction
from servegym.replay.terms import TERMS, decode_parts
from servegym.typing import BoolArray, FloatArray, IntArray

#: A factor nearer to 1 than this is no drift, however surely it is known.
TOLERANCE = 0.03
#: Logarithm of a factor: with a larger standard error the log does not tell it.
_UNKNOWN = 0.1


class Effect(NamedTuple):
    """A factor with its 95 % interval, or seconds.

    Attributes:
        value: Best estimate.
        low: Lower end.
        high: Upper end.
        drifted: Whether it is off by more than the tolerance, and surely so.
        known: Whether the log tells it.
    """

    value: float
    low: float
    high: float
    drifted: bool
    known: bool


@dataclass(frozen=True)
class Stretch:
    """A replica over a time in which it did not change.

    Attributes:
        index: Among the replica's stretches, those with too few requests included.
        begin_s: Since when, after the first dispatch.
        end_s: Until when.
        num_requests: Compared requests.
        decode: Factor on decode steps: `step` and `kv` as they are mixed in a typical one.
        terms: Factors on single terms by name, and `request` in seconds.
        correlation: Of the estimates of `step` and `kv`.
        batch: Decoding sequences of a typical step.
        kv_tokens: That these attend to.
    """

    index: int
    begin_s: float
    end_s: float
    num_requests: int
    decode: Effect
    terms: dict[str, Effect]
    correlation: float
    batch: float
    kv_tokens: float

    @property
    def prefill(self) -> Effect:
        """Factor on the work of prompt tokens."""
        return self.terms["prefill"]

    @property
    def drifted(self) -> bool:
        """Whether its costs are not what they should be."""
        return self.decode.drifted or self.prefill.drifted


class Windows(NamedTuple):
    """A replica's factors over time.

    Attributes:
        middle_s: `float64[W]`.
        values: On decode and prefill, `float64[W, 2]`.
        low: 95 % interval, likewise.
        high: Likewise.
        num_requests: Compared, `int64[W]`.
    """

    middle_s: FloatArray
    values: FloatArray
    low: FloatArray
    high: FloatArray
    num_requests: IntArray


@dataclass(frozen=True)
class ReplicaDrift:
    """What became of one replica.

    Attributes:
        name: Of the replica.
        stretches: In order of time; empty if there were too few requests.
        windows: Factors over time, where the log is long enough.
        num_requests: Compared requests.
    """

    name: str
    stretches: tuple[Stretch, ...]
    windows: Windows | None
    num_requests: int

    @property
    def now(self) -> Stretch | None:
        """The stretch that the log ends in, if there is any."""
        return self.stretches[-1] if self.stretches else None


@dataclass(frozen=True)
class Drift:
    """How all replicas of a fleet have drifted.

    Attributes:
        replicas: One each.
        fit: Of the stretches.
        tolerance: Factors nearer to 1 are no drift.
    """

    replicas: tuple[ReplicaDrift, ...]
    fit: Fit
    tolerance: float

    def factors(self) -> Factors:
        """Return the costs that the log speaks for: what is as expected stays as it was."""
        found = self.fit.factors()
        values = found.values.copy()
        for r, replica in enumerate(self.replicas):
            drifted = [stretch.index for stretch in replica.stretches if stretch.drifted]
            values[~np.isin(self.fit.stretch[:, r], drifted), r] = 1.0
        return Factors(found.edges_s, values)


def find_drift(
    forced: Forced,
    observed: Observed,
    expected: Prediction,
    *,
    tolerance: float = TOLERANCE,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Drift:
    """Fit the terms of every replica, look for changes, and fit again between them.

    Args:
        forced: Dispatches.
        observed: What happened.
        expected: What the cost model says of them.
        tolerance: Smallest deviation that matters.
        progress: Called with what is done and the share of the work.
    """
    progress("costs of the whole log", 0.0)
    whole = fit(forced, observed, FULL)
    met = conditions(forced, observed.ttft_s, observed.e2e_s, expected.cached_tokens)
    edges_s = window_edges(forced, observed)
    if not len(edges_s):
        return _drift(forced, observed, met, whole, None, tolerance)
    progress("costs over time", 0.3)
    decode = whole.values[:, :, :2].mean(axis=2)
    start = np.repeat(np.stack((decode, whole.values[:, :, 2]), axis=2), len(edges_s) + 1, axis=0)
    windows = fit(forced, observed, COARSE, edges_s=edges_s, base=whole, start=start)
    changes = changed_windows(windows, tolerance)
    if not any(changes):
        return _drift(forced, observed, met, whole, windows, tolerance)
    progress("costs before and after changes", 0.7)
    times = refined(forced, observed, windows, whole, changes)
    laid = layout(times)
    start = np.repeat(whole.values, int(laid.stretch.max()) + 1, axis=0)
    for r, between in enumerate(means_between(windows, changes)):
        for j, (decode_log, prefill_log) in enumerate(between):
            start[j, r, :3] = decode_log, decode_log, prefill_log
    final = fit(forced, observed, FULL, edges_s=laid.edges_s, stretch=laid.stretch, start=start)
    return _drift(forced, observed, met, final, windows, tolerance, times)


def _drift(
    forced: Forced,
    observed: Observed,
    met: Conditions,
    final: Fit,
    windows: Fit | None,
    tolerance: float,
    times: list[list[float]] | None = None,
) -> Drift:
    times = times or [[] for _ in forced.fleet.names]
    final = _widened(final, windows, times)
    tests = 2 * sum(len(mine) + 1 for mine in times)
    sure_z = NormalDist().inv_cdf(1.0 - 0.5 * FALSE_ALARM / tests)
    replicas = []
    for r, name in enumerate(forced.fleet.names):
        mine = observed.usable & (observed.replica == r)
        bounds = [0.0, *times[r], forced.span_s]
        stretches = []
        for j, (begin_s, end_s) in enumerate(pairwise(bounds)):
            here = mine & (observed.at_s >= begin_s)
            here &= observed.at_s < end_s if j + 2 < len(bounds) else True
            if here.sum() < MIN_REQUESTS:
                continue
            stretches.append(
                _stretch(forced, met, final, r, j, here, (begin_s, end_s), sure_z, tolerance)
            )
        over_time = _windows_of(windows, forced, r) if windows is not None else None
        replicas.append(ReplicaDrift(name, tuple(stretches), over_time, int(mine.sum())))
    return Drift(tuple(replicas), final, tolerance)


def _widened(final: Fit, windows: Fit | None, times: list[list[float]]) -> Fit:
    """Make a stretch at least as uncertain as the scatter of its windows says."""
    if windows is None:
        return final
    size = len(final.parameters)
    covariance = final.covariance.copy()
    middle_s = middles(windows)
    for r, mine in enumerate(times):
        stretch_of = np.searchsorted(np.array(mine), middle_s, side="right")
        for j in range(len(mine) + 1):
            values = windows.values[stretch_of == j, r]
            if len(values) < MIN_WINDOWS:
                continue
            part = slice(j * size, (j + 1) * size)
            block = final.block(j, r)
            spread = values.std(axis=0, ddof=1) / math.sqrt(len(values))
            alone = np.array([_sigma_of_decode(block), math.sqrt(block[2, 2])])
            factor = float(np.clip(spread / np.maximum(alone, 1e-9), 1.0, 3.0).max())
            covariance[r, part, :] *= factor
            covariance[r, :, part] *= factor
    return replace(final, covariance=covariance)


def _sigma_of_decode(block: FloatArray) -> float:
    """Return the least standard error of a mixture of the first two parameters."""
    return math.sqrt(max(float(np.linalg.eigvalsh(block[:2, :2])[0]), 0.0))


def _windows_of(windows: Fit, forced: Forced, r: int) -> Windows:
    sigma = scattered(windows)[:, r]
    logs = windows.values[:, r]
    return Windows(
        middles(windows),
        np.exp(logs),
        np.exp(logs - 1.96 * sigma),
        np.exp(logs + 1.96 * sigma),
        windows.count[:, r],
    )


def _stretch(
    forced: Forced,
    met: Conditions,
    final: Fit,
    r: int,
    j: int,
    here: BoolArray,
    span: tuple[float, float],
    sure_z: float,
    tolerance: float,
) -> Stretch:
    logs, block = final.values[j, r], final.block(j, r)
    sigma = np.sqrt(np.diagonal(block))
    batch, kv_tokens = float(np.median(met.batch[here])), float(np.median(met.kv_tokens[here]))
    grid = forced.fleet.types[r].grid
    parts = decode_parts(grid, np.array([batch]), np.array([kv_tokens]))
    before = np.array([float(parts.step_s[0]), float(parts.kv_s[0])])
    after = before * np.exp(logs[:2])
    lean = after / after.sum()
    decode = math.log(after.sum() / before.sum())
    decode_sigma = math.sqrt(max(float(lean @ block[:2, :2] @ lean), 0.0))

    def effect(log: float, error: float) -> Effect:
        far = abs(log) > math.log1p(tolerance) and abs(log) > sure_z * error
        ends = (math.exp(log - 1.96 * error), math.exp(log + 1.96 * error))
        return Effect(math.exp(log), *ends, drifted=far, known=error <= _UNKNOWN)

    terms = {name: effect(float(logs[i]), float(sigma[i])) for i, name in enumerate(TERMS)}
    seconds, error = float(logs[-1]), float(sigma[-1])
    terms["request"] = Effect(
        seconds,
        seconds - 1.96 * error,
        seconds + 1.96 * error,
        drifted=abs(seconds) > max(1e-3, sure_z * error),
        known=error <= 0.05,
    )
    return Stretch(
        j,
        *span,
        num_requests=int(here.sum()),
        decode=effect(decode, decode_sigma),
        terms=terms,
        correlation=float(block[0, 1] / max(sigma[0] * sigma[1], 1e-300)),
        batch=batch,
        kv_tokens=kv_tokens,
    )
