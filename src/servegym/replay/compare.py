"""Predicted against observed latencies, with intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.replay.conditions import Observed
from servegym.replay.forced import Forced, Prediction
from servegym.replay.log import ReplayLog
from servegym.typing import BoolArray, FloatArray

METRICS = ("ttft_s", "tpot_s", "e2e_s")
STATISTICS = ("mean", "p50", "p90", "p99")
_RESAMPLES = 200
#: Blocks of requests that are drawn together, for those near in time are alike.
_BLOCKS = 50
#: Fewer requests make no statistic.
_LEAST = 5


class Figure(NamedTuple):
    """One statistic of one latency.

    Attributes:
        scope: `all`, `replica` or `class`.
        name: Of the replica or class, "" for all.
        metric: One of `METRICS`.
        statistic: One of `STATISTICS`.
        observed: Seconds.
        predicted: Seconds.
        low: 95 % interval of the error, lower end.
        high: Upper end.
        num_requests: Compared.
    """

    scope: str
    name: str
    metric: str
    statistic: str
    observed: float
    predicted: float
    low: float
    high: float
    num_requests: int

    @property
    def error(self) -> float:
        """Predicted over observed, less 1."""
        return self.predicted / self.observed - 1.0


class Latencies(NamedTuple):
    """TTFT, TPOT and E2E after the arrival, seconds, NaN where there is none, `float64[m]`."""

    ttft_s: FloatArray
    tpot_s: FloatArray
    e2e_s: FloatArray


def observed_latencies(log: ReplayLog, forced: Forced, observed: Observed) -> Latencies:
    """Take them from the log, of finished requests."""
    rows = forced.rows
    done = log.finished[rows]
    e2e_s = np.where(done, log.e2e_s[rows], np.nan)
    ttft_s = np.where(observed.usable, log.ttft_s[rows], np.nan)
    return Latencies(ttft_s, _tpot(ttft_s, e2e_s, observed), e2e_s)


def predicted_latencies(
    log: ReplayLog,
    forced: Forced,
    observed: Observed,
    made: Prediction,
    extra_s: FloatArray | float,
) -> Latencies:
    """Take them from a simulation; the time until the last dispatch is as it was.

    Args:
        log: The log.
        forced: Its dispatches.
        observed: Says which requests are compared.
        made: The simulation.
        extra_s: Seconds that each request spends outside the engine.
    """
    wait_s = log.dispatch_s[forced.rows] + extra_s
    e2e_s = np.where(log.finished[forced.rows], made.e2e_s + wait_s, np.nan)
    ttft_s = np.where(observed.usable, made.ttft_s + wait_s, np.nan)
    return Latencies(ttft_s, _tpot(ttft_s, e2e_s, observed), e2e_s)


def _tpot(ttft_s: FloatArray, e2e_s: FloatArray, observed: Observed) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(observed.gaps > 0, (e2e_s - ttft_s) / observed.gaps, np.nan)


def compare(
    log: ReplayLog,
    forced: Forced,
    observed: Latencies,
    predicted: Latencies,
    chosen: BoolArray | None = None,
) -> list[Figure]:
    """Compare all requests, those of each replica and those of each class.

    Args:
        log: The log.
        forced: Its dispatches.
        observed: What was.
        predicted: What should have been.
        chosen: Requests to compare, `bool[m]`; left out: all.
    """
    chosen = np.ones(len(forced), np.bool_) if chosen is None else chosen
    scopes: list[tuple[str, str, BoolArray]] = [("all", "", chosen)]
    for r, name in enumerate(log.fleet.names):
        scopes.append(("replica", name, chosen & (forced.actions == r)))
    for c, name in enumerate(log.class_names):
        scopes.append(("class", name, chosen & (forced.table.slo_class == c)))
    found = []
    for scope, name, rows in scopes:
        for metric in METRICS:
            was, made = getattr(observed, metric)[rows], getattr(predicted, metric)[rows]
            there = np.isfinite(was) & np.isfinite(made) & (was > 0)
            found += _figures(scope, name, metric, was[there], made[there])
    return found


def _figures(
    scope: str, name: str, metric: str, observed: FloatArray, predicted: FloatArray
) -> list[Figure]:
    if len(observed) < _LEAST:
        return []
    was, made = _statistics(observed), _statistics(predicted)
    rng = np.random.default_rng(0)
    blocks = np.array_split(np.arange(len(observed)), min(_BLOCKS, len(observed)))
    errors = []
    for draw in rng.integers(0, len(blocks), (_RESAMPLES, len(blocks))):
        rows = np.concatenate([blocks[i] for i in draw])
        errors.append(_statistics(predicted[rows]) / _statistics(observed[rows]) - 1.0)
    low, high = np.percentile(np.array(errors), (2.5, 97.5), axis=0)
    values = zip(STATISTICS, was.tolist(), made.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Figure(scope, name, metric, *value, len(observed)) for value in values]


def _statistics(values: FloatArray) -> FloatArray:
    return np.array([values.mean(), *np.percentile(values, (50, 90, 99))])
