"""Any allowed replica, all equally likely."""

from __future__ import annotations

from servegym.baselines.choice import no_replica, random_allowed
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
    r = random_allowed(mask, rng, -1)
    return r if r >= 0 else no_replica(mask)


def random_choice() -> Heuristic:
    """Any allowed replica, all equally likely."""
    return Heuristic(
        name="random-choice",
        information="blind",
        needs=Group.COUNTERS,
        decide=decide,
        reference="",
    )
