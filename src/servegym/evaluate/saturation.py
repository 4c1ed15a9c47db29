"""The largest load a policy bears."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servegym.evaluate.harness import evaluate
from servegym.problems.problem import AnyProblem, Policy, Scenario
from servegym.problems.registry import problem_of

#: Smallest and largest load tried.
SMALLEST, LARGEST = 0.05, 4.0


def saturation_load(
    scenario: Scenario,
    policy: Policy,
    attainment: float,
    *,
    problem: AnyProblem | None = None,
    num_seeds: int = 3,
    num_units: int | None = None,
    tolerance: float = 0.02,
    largest: float = LARGEST,
) -> float:
    """Bisect for the largest load at which a share of an episode is as it should be.

    Args:
        scenario: What to play.
        policy: Under which policy.
        attainment: Share, e.g. 0.9, of requests within their limits or of jobs in time.
        problem: What is decided; may be left out for a scenario of `problems.registry`.
        num_seeds: Held-out episodes per load; the same for every load.
        num_units: Requests or jobs per episode, else the scenario's own.
        tolerance: Relative precision of the answer.
        largest: Largest load tried.

    Returns:
        The load, 0 if even the smallest is too much, the largest if nothing is.

    Raises:
        ConfigError: If there is none, see `Problem.require_saturation`.
    """
    problem = problem or problem_of(scenario)
    metric = problem.require_saturation(scenario).metric

    def met(load: float) -> bool:
        result = evaluate(
            scenario,
            [policy],
            problem=problem,
            loads=[load],
            num_seeds=num_seeds,
            num_units=num_units,
        )
        return result.mean(policy.name, load, metric) >= attainment

    return _largest(met, SMALLEST, largest, tolerance)


def _largest(met: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    if not met(low):
        return 0.0
    if met(high):
        return high
    while high / low > 1.0 + tolerance:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if met(middle) else (low, middle)
    return low
