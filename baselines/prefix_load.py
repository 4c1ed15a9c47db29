"""Tunable: seconds of prefill, with the prefix taken off, plus seconds of decode load.

The speed-normalised relative of the Dynamo cost, and the strongest cheap rival of a learned
policy: prefill + weight * (requests + 1) / speed^eta.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import Group, ReplicaFeature, RequestFeature
from servegym.policy.costs import prefix_load_s
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

_OUT = int(ReplicaFeature["OUTSTANDING_REQUESTS"])
_PENDING = int(ReplicaFeature["PENDING_PREFILL_TOKENS"])
_SPEED = int(ReplicaFeature["RELATIVE_SPEED"])
_RATE = int(ReplicaFeature["PREFILL_TOKENS_PER_S"])
_HIT = int(ReplicaFeature["PREFIX_HIT_TOKENS"])
_QPROMPT = int(RequestFeature["PROMPT_TOKENS"])


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
            new = replicas[_PENDING, r] + max(0.0, request[_QPROMPT] - replicas[_HIT, r])
            new_s, load, speed = new / replicas[_RATE, r], replicas[_OUT, r], replicas[_SPEED, r]
            cost = prefix_load_s(new_s, load, speed, params[0], params[1])
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def prefix_load(weight: float = 0.05, eta: float = 1.0) -> Heuristic:
    """Tunable: seconds of prefill, with the prefix taken off, plus seconds of decode load."""
    return Heuristic(
        name="prefix-load",
        information="metric",
        needs=Group.COUNTERS | Group.PREFIX,
        decide=decide,
        params=np.array([weight, eta], np.float64),
        param_names=(
            "weight",
            "eta",
        ),
        reference="",
    )
