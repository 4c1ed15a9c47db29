"""Least outstanding requests (JSQ): fewest dispatched and not ended."""

from __future__ import annotations

from servegym.baselines.choice import better, no_replica, num_replicas
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
    best, best_cost = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            cost = replicas[OUTSTANDING_REQUESTS, r]
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def least_outstanding() -> Heuristic:
    """Least outstanding requests (JSQ): fewest dispatched and not ended."""
    return Heuristic(
        name="least-outstanding",
        information="blind",
        needs=Group.COUNTERS,
        decide=decide,
        reference="Vidur lor",
    )
