"""Minimum completion time: predicted finish of this request, its own time included."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import (
    better,
    decode_tokens_left,
    inferred,
    no_replica,
    num_replicas,
    own_tokens,
)
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    MAX_NUM_SEQS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
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
            new = replicas[PENDING_PREFILL_TOKENS, r] + max(
                0.0, request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r]
            )
            batch = min(replicas[OUTSTANDING_REQUESTS, r] + 1.0, replicas[MAX_NUM_SEQS, r])
            each_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], batch - 1.0)
            over = max(0.0, replicas[OUTSTANDING_REQUESTS, r] + 1.0 - replicas[MAX_NUM_SEQS, r])
            queue_s = over / batch * decode_tokens_left(replicas, r, params[0]) / batch * each_s
            cost = (
                new / replicas[PREFILL_TOKENS_PER_S, r]
                + queue_s
                + own_tokens(request, params[0]) * each_s
            )
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def mct(shrink: float = 0.0) -> Heuristic:
    """Minimum completion time: predicted finish of this request, its own time included."""
    return Heuristic(
        name="mct",
        information="predictive",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX | inferred(shrink=shrink, left=shrink),
        decide=decide,
        params=np.array([shrink], np.float64),
        param_names=("shrink",),
        reference="",
    )
