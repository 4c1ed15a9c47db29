"""The largest load a policy bears."""

from __future__ import annotations

import numpy as np

from servegym.evaluate.harness import FIRST_SEED, evaluate
from servegym.policy.policy import Policy
from servegym.scenario import Scenario


def saturation_load(
    scenario: Scenario,
    policy: Policy,
    attainment: float,
    *,
    num_seeds: int = 3,
    low: float = 0.05,
    high: float = 4.0,
    tolerance: float = 0.02,
) -> float:
    """Bisect for the largest load at which `attainment` of the requests meet their limits.

    Args:
        scenario: What to play.
        policy: Under which policy.
        attainment: Share, e.g. 0.9.
        num_seeds: Episodes per load; the same for every load.
        low: Smallest load tried.
        high: Largest load tried.
        tolerance: Relative precision of the answer.

    Returns:
        The load, 0 if even `low` is too much, `high` if nothing is.
    """

    def met(load: float) -> bool:
        result = evaluate(
            scenario, [policy], loads=[load], num_seeds=num_seeds, first_seed=FIRST_SEED
        )
        return result.mean(policy.name, load, "slo_attainment") >= attainment

    if not met(low):
        return 0.0
    if met(high):
        return high
    while high / low > 1.0 + tolerance:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if met(middle) else (low, middle)
    return low
