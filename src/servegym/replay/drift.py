"""Which terms of which replica's costs have drifted, by how much and since when."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from servegym.replay.conditions import Conditions, Observed, conditions
from servegym.replay.fit import COARSE, FULL, Fit, fit
from servegym.replay.forced import Factors, Forced, Prediction
from servegym.replay.terms import TERMS, decode_parts
from servegym.typing import BoolArray, FloatArray, IntArray

#: A factor nearer to 1 than this is no drift, however surely it is known.
TOLERANCE = 0.03
#: Logarithm of a factor: with a larger standard error the log does not tell it.
_UNKNOWN = 0.1
#: Two terms whose estimates go together like this cannot be told apart.
_CORRELATED = -0.8
#: Requests of a replica that a window needs, and how many windows there may be.
_WINDOW_REQUESTS = 40
_MIN_WINDOWS, _MAX_WINDOWS = 4, 16
#: Windows that a replica stays as it is, or the log does not tell a change from an outlier.
_LEAST_WINDOWS = 2
#: Chance of seeing a change, or a drift, where there is none: in the whole log.
_FALSE_ALARM = 0.01
#: Requests of a replica below which nothing is said of it.
MIN_REQUESTS = 30


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
    edges_s = _window_edges(forced, observed)
    if not len(edges_s):
        return _drift(forced, observed, met, whole, None, tolerance)
    progress("costs over time", 0.3)
    decode = whole.values[:, :, :2].mean(axis=2)
    start = np.repeat(np.stack((decode, whole.values[:, :, 2]), axis=2), len(edges_s) + 1, axis=0)
    windows = fit(forced, observed, COARSE, edges_s=edges_s, base=whole, start=start)
    changes = _changes(windows, tolerance)
    if not any(changes):
        return _drift(forced, observed, met, whole, windows, tolerance)
    progress("costs before and after changes", 0.7)
    times = _refined(forced, observed, windows, whole, changes)
    layout = _stretches(times)
    start = np.repeat(whole.values, int(layout.stretch.max()) + 1, axis=0)
    for r, means in enumerate(_means(windows, changes)):
        for j, (decode_log, prefill_log) in enumerate(means):
            start[j, r, :3] = decode_log, decode_log, prefill_log
    final = fit(forced, observed, FULL, edges_s=layout.edges_s, stretch=layout.stretch, start=start)
    return _drift(forced, observed, met, final, windows, tolerance, times)


def _window_edges(forced: Forced, observed: Observed) -> FloatArray:
    counts = np.bincount(observed.replica[observed.usable], minlength=len(forced.fleet.names))
    enough = counts[counts >= MIN_REQUESTS]
    num = int(np.median(enough) // _WINDOW_REQUESTS) if len(enough) else 0
    if num < _MIN_WINDOWS:
        return np.zeros(0)
    num = min(num, _MAX_WINDOWS)
    return np.linspace(0.0, forced.span_s, num + 1)[1:-1]


def _scattered(windows: Fit) -> FloatArray:
    """Standard errors of windows, at least what neighbours scatter by, `float64[W, R, P]`."""
    steps = np.diff(windows.values, axis=0)
    local = 1.4826 * np.median(np.abs(steps), axis=0) / math.sqrt(2.0)
    usual = np.maximum(np.median(windows.count, axis=0), 1.0)
    fewer = np.sqrt(usual / np.maximum(windows.count, 1.0))[:, :, None]
    return np.asarray(np.maximum(np.maximum(windows.sigma(), local * fewer), 1e-4))


def _changes(windows: Fit, tolerance: float) -> list[list[int]]:
    """Return for each replica the windows that begin with a change."""
    num_windows, num_replicas, size = windows.values.shape
    sigma = _scattered(windows)
    tests = max(1, (num_windows - 1) * num_replicas * size)
    least_z = NormalDist().inv_cdf(1.0 - 0.5 * _FALSE_ALARM / tests)
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


def _refined(
    forced: Forced, observed: Observed, windows: Fit, whole: Fit, changes: list[list[int]]
) -> list[list[float]]:
    """Move each change to where, within a window, the simulation agrees best around it."""
    width_s = float(windows.edges_s[0])
    shifts = np.linspace(-1.0, 1.0, 13) * width_s
    times = [[float(windows.edges_s[at - 1]) for at in mine] for mine in changes]
    means = _means(windows, changes)
    variants = []
    for shift in shifts.tolist():
        moved = _stretches([[time + shift for time in mine] for mine in times])
        values = np.ones((len(moved.edges_s) + 1, len(times), len(TERMS)))
        for w, row in enumerate(moved.stretch.tolist()):
            for r, j in enumerate(row):
                decode, prefill = np.exp(means[r][j])
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
    refined = []
    for r, mine in enumerate(times):
        row = []
        for time in mine:
            near = (observed.replica == r) & (np.abs(observed.at_s - time) < 1.5 * width_s)
            best = int(np.argmin([one[near].sum() for one in off]))
            row.append(time + float(shifts[best]))
        refined.append(sorted(row))
    return refined


def _means(windows: Fit, changes: list[list[int]]) -> list[list[FloatArray]]:
    sigma = _scattered(windows)
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


class _Layout(NamedTuple):
    """Windows between all changes, and which stretch of a replica each is in."""

    edges_s: FloatArray
    stretch: IntArray


def _stretches(times: list[list[float]]) -> _Layout:
    edges = np.unique(np.array([t for mine in times for t in mine]))
    begins = np.concatenate(([-np.inf], edges))
    stretch = np.stack(
        [np.searchsorted(np.array(mine), begins, side="right") for mine in times], axis=1
    )
    return _Layout(edges, stretch.astype(np.int64))


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
    sure_z = NormalDist().inv_cdf(1.0 - 0.5 * _FALSE_ALARM / tests)
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
    middle_s = _middles(windows)
    for r, mine in enumerate(times):
        stretch_of = np.searchsorted(np.array(mine), middle_s, side="right")
        for j in range(len(mine) + 1):
            values = windows.values[stretch_of == j, r]
            if len(values) < _MIN_WINDOWS:
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


def _middles(windows: Fit) -> FloatArray:
    width_s = float(windows.edges_s[0])
    return np.asarray((np.arange(len(windows.values)) + 0.5) * width_s)


def _windows_of(windows: Fit, forced: Forced, r: int) -> Windows:
    sigma = _scattered(windows)[:, r]
    logs = windows.values[:, r]
    return Windows(
        _middles(windows),
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


def sentence(replica: ReplicaDrift) -> str:
    """Say in one line how a replica compares with its cost model."""
    if not replica.stretches:
        return f"replica {replica.name}: too few requests to tell ({replica.num_requests})"
    parts = []
    for i, stretch in enumerate(replica.stretches):
        when = ""
        if len(replica.stretches) > 1:
            last = i + 1 == len(replica.stretches)
            when = f"from {stretch.begin_s:.0f} s on " if last else f"until {stretch.end_s:.0f} s "
            if not last and i > 0:
                when = f"from {stretch.begin_s:.0f} s to {stretch.end_s:.0f} s "
        parts.append(when + "; ".join(_phrases(stretch)))
    return f"replica {replica.name}: " + "; ".join(parts)


def _phrases(stretch: Stretch) -> list[str]:
    found = [_phrase("decode", stretch.decode), _phrase("prefill", stretch.prefill)]
    request = stretch.terms["request"]
    if request.drifted and request.known:
        found.append(
            f"{1e3 * request.value:+.1f} ms [{1e3 * request.low:.1f}, {1e3 * request.high:.1f}] "
            "a request outside the engine"
        )
    return found


def _phrase(what: str, effect: Effect) -> str:
    if not effect.known:
        return f"{what} cannot be told from this log ({effect.low:.2f}x to {effect.high:.2f}x)"
    if not effect.drifted:
        return f"{what} as expected"
    if effect.value > 1:
        ends = f"[{effect.low:.2f}, {effect.high:.2f}]"
        return f"{what} {effect.value:.2f}x {ends} slower than its cost model"
    ends = f"[{1 / effect.high:.2f}, {1 / effect.low:.2f}]"
    return f"{what} {1 / effect.value:.2f}x {ends} faster than its cost model"


def identifiability(stretch: Stretch) -> str:
    """Say which terms a log cannot tell apart, or ""."""
    step, kv = stretch.terms["step"], stretch.terms["kv"]
    if step.known and kv.known and stretch.correlation > _CORRELATED:
        return ""
    if stretch.correlation <= _CORRELATED:
        return (
            f"step and kv cannot be told apart (correlation {stretch.correlation:.2f}): "
            "only decode, which has both, is known"
        )
    open_terms = [name for name, one in stretch.terms.items() if not one.known]
    return f"the log says little of {' and '.join(open_terms)}" if open_terms else ""
