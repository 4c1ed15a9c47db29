"""Tunable: seconds of prefill, with the prefix taken off, plus seconds of decode load.

The speed-normalised relative of the Dynamo cost, and the strongest cheap rival of a learned
policy: prefill + weight * (requests + 1) / speed^eta.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import (
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    RELATIVE_SPEED,
    Group,
)
from servegym.policy.costs import prefix_load_s
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
            new = max(0.0, request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r])
            new_s = (replicas[PENDING_PREFILL_TOKENS, r] + new) / replicas[PREFILL_TOKENS_PER_S, r]
            load, speed = replicas[OUTSTANDING_REQUESTS, r], replicas[RELATIVE_SPEED, r]
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
