"""Smooth weighted round robin; weights are the known speeds."""

from __future__ import annotations

from servegym.baselines.choice import no_replica, num_replicas
from servegym.policy.contract import RELATIVE_SPEED, Group
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
    best, total = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            memory[r] += replicas[RELATIVE_SPEED, r]
            total += replicas[RELATIVE_SPEED, r]
            if best < 0 or memory[r] > memory[best]:
                best = r
    if best < 0:
        return no_replica(mask)
    memory[best] -= total
    return best


def weighted_round_robin() -> Heuristic:
    """Smooth weighted round robin; weights are the known speeds."""
    return Heuristic(
        name="weighted-round-robin",
        information="metric",
        needs=Group.COUNTERS,
        decide=decide,
        memory_size=1024,
        reference="smooth weighted round robin (nginx)",
    )
