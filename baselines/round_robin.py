"""One replica after the other."""

from __future__ import annotations

from servegym.baselines.choice import no_replica, num_replicas
from servegym.policy.contract import Group
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
    width = num_replicas(mask)
    for i in range(width):
        r = (int(memory[0]) + i) % width
        if mask[r]:
            memory[0] = r + 1
            return r
    return no_replica(mask)


def round_robin() -> Heuristic:
    """One replica after the other."""
    return Heuristic(
        name="round-robin",
        information="blind",
        needs=Group.COUNTERS,
        decide=decide,
        memory_size=1,
        reference="default of Vidur and Splitwise",
    )
