"""A replay from log to numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from servegym.replay.compare import (
    Figure,
    Latencies,
    compare,
    observed_latencies,
    predicted_latencies,
)
from servegym.replay.conditions import Observed
from servegym.replay.counterfactual import (
    Arrivals,
    Counterfactual,
    Loop,
    counterfactuals,
    deciding_policies,
)
from servegym.replay.drift import TOLERANCE, Drift, find_drift
from servegym.replay.forced import Factors, Forced, Prediction
from servegym.replay.log import ReplayLog
from servegym.replay.refit import HeldOut, held_out


@dataclass(frozen=True)
class Replayed:
    """What a replay found.

    Attributes:
        log: The log.
        forced: Its dispatches.
        observed: Latencies of its requests.
        predicted: With the costs as they are.
        corrected: With the factors found, and seconds outside the engine.
        figures: Predicted against observed.
        corrected_figures: Corrected against observed, on the data of the fit.
        drift: Of each replica.
        arrivals: That policies are simulated with.
        counterfactuals: The logged decisions, then policies.
        unknown_policies: That decided, but cannot be found.
        held_out: With a refit: errors on a later part.
        num_preemptions: In the simulation.
        cached: Mean share of prompt tokens found cached: engines', where reported, and simulated
            for the same requests.
    """

    log: ReplayLog
    forced: Forced
    observed: Latencies
    predicted: Latencies
    corrected: Latencies
    figures: list[Figure]
    corrected_figures: list[Figure]
    drift: Drift
    arrivals: Arrivals
    counterfactuals: list[Counterfactual]
    unknown_policies: list[str]
    held_out: HeldOut | None
    num_preemptions: int
    cached: tuple[float, float] | None


def replay(
    log: ReplayLog,
    policies: Sequence[str] | None = None,
    *,
    loop: Loop | None = None,
    tolerance: float = TOLERANCE,
    test: bool = False,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Replayed:
    """Simulate a log's arrivals, compare, and look for drift.

    Args:
        log: The log.
        policies: To simulate beside the logged decisions; left out: those that decided.
        loop: Whether under policies requests wait for the answers they followed; left out: where
            the log says what they are.
        tolerance: Smallest deviation of a cost that matters.
        test: Also fit on the earlier part of the log and test on the later one.
        progress: Called with what is done and the share of the work.

    Raises:
        WorkloadError: If nothing of the log can be simulated.
        ConfigError: If a policy is unknown, the log is too short to be tested on, or it does not
            say what followed what and the loop is to be closed.
    """
    arrivals = Arrivals.of(log, loop)
    forced = Forced.of(log)
    seen = Observed.of(log, forced)
    progress("the decisions as logged", 0.0)
    [expected] = forced.play([Factors.ones(len(log.fleet.names))])
    drift = find_drift(
        forced,
        seen,
        expected,
        tolerance=tolerance,
        progress=lambda text, share: progress(text, 0.05 + 0.5 * share),
    )
    factors = drift.factors()
    [corrected] = forced.play([factors])
    was = observed_latencies(log, forced, seen)
    predicted = predicted_latencies(log, forced, seen, expected, 0.0)
    request_s = np.zeros(len(log))
    request_s[forced.rows] = drift.fit.request_s(seen.at_s, seen.replica)
    better = predicted_latencies(log, forced, seen, corrected, request_s[forced.rows])
    arrivals = arrivals.with_way(request_s)
    progress("errors", 0.55)
    figures = compare(log, forced, was, predicted)
    corrected_figures = compare(log, forced, was, better)
    tested = None
    if test:
        progress("a test on the later part", 0.65)
        tested = held_out(log, forced, seen, tolerance)
    decided, unknown = deciding_policies(log)
    progress("other policies", 0.9)
    found = counterfactuals(log, decided if policies is None else policies, factors, arrivals)
    progress("done", 1.0)
    return Replayed(
        log=log,
        forced=forced,
        observed=was,
        predicted=predicted,
        corrected=better,
        figures=figures,
        corrected_figures=corrected_figures,
        drift=drift,
        arrivals=arrivals,
        counterfactuals=found,
        unknown_policies=unknown,
        held_out=tested,
        num_preemptions=int(expected.num_preemptions.sum()),
        cached=_cached(log, forced, expected),
    )


def _cached(log: ReplayLog, forced: Forced, made: Prediction) -> tuple[float, float] | None:
    reported = log.cached_tokens[forced.rows]
    told = reported >= 0
    prompts = float(forced.table.prompt_tokens[told].sum())
    if not prompts:
        return None
    return float(reported[told].sum() / prompts), float(made.cached_tokens[told].sum() / prompts)
