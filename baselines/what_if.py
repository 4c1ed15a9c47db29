"""Forward simulation of each choice: earliest predicted end of this request."""

from __future__ import annotations

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import WHAT_IF_E2E_S, Group
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
            cost = replicas[WHAT_IF_E2E_S, r]
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def what_if() -> Heuristic:
    """Forward simulation of each choice: earliest predicted end of this request."""
    return Heuristic(
        name="what-if",
        information="predictive",
        needs=Group.COUNTERS | Group.WHAT_IF,
        decide=decide,
        reference="Block, arXiv 2508.03611",
    )
