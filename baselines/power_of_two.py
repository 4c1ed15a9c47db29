"""Power of two choices: the less loaded of two different random replicas."""

from __future__ import annotations

from servegym.baselines.choice import no_replica, random_allowed
from servegym.policy.contract import OUTSTANDING_REQUESTS, Group
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array


@rule
def decide(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `policy.rule`."""
    first = random_allowed(mask, rng, -1)
    if first < 0:
        return no_replica(mask)
    second = random_allowed(mask, rng, first)
    if (
        second < 0
        or replicas[OUTSTANDING_REQUESTS, second] >= replicas[OUTSTANDING_REQUESTS, first]
    ):
        return first
    return second


def power_of_two() -> Heuristic:
    """Power of two choices: the less loaded of two different random replicas."""
    return Heuristic(
        name="power-of-two",
        information="blind",
        needs=Group.COUNTERS,
        decide=decide,
        reference="Mitzenmacher 2001",
    )
