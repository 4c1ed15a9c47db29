"""The family (n + 1) / s^eta: eta 0 is least outstanding, 1 weighted by speed."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import OUTSTANDING_REQUESTS, RELATIVE_SPEED, Group
from servegym.policy.costs import load_by_speed
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
            cost = load_by_speed(
                replicas[OUTSTANDING_REQUESTS, r], replicas[RELATIVE_SPEED, r], params[0]
            )
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def speed_family(eta: float = 1.0) -> Heuristic:
    """The family (n + 1) / s^eta: eta 0 is least outstanding, 1 weighted by speed."""
    return Heuristic(
        name="speed-family",
        information="metric",
        needs=Group.COUNTERS,
        decide=decide,
        params=np.array([eta], np.float64),
        param_names=("eta",),
        reference="",
    )
