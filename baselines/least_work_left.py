"""Least work left: smallest sum of the predicted times its requests still want."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import (
    better,
    decode_tokens_left,
    inferred,
    no_replica,
    num_replicas,
)
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    MAX_NUM_SEQS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    Group,
)
from servegym.policy.costs import step_s
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
            prefill_s = replicas[PENDING_PREFILL_TOKENS, r] / replicas[PREFILL_TOKENS_PER_S, r]
            batch = min(max(1.0, replicas[OUTSTANDING_REQUESTS, r]), replicas[MAX_NUM_SEQS, r])
            each_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], batch - 1.0)
            cost = prefill_s + decode_tokens_left(replicas, r, params[0]) * each_s
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def least_work_left(shrink: float = 0.0) -> Heuristic:
    """Least work left: smallest sum of the predicted times its requests still want."""
    return Heuristic(
        name="least-work-left",
        information="predictive",
        needs=Group.COUNTERS | Group.METRICS | inferred(left=shrink),
        decide=decide,
        params=np.array([shrink], np.float64),
        param_names=("shrink",),
        reference="",
    )
