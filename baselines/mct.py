"""Minimum completion time: predicted finish of this request, its own time included."""

from __future__ import annotations

from servegym.baselines.choice import (
    better,
    decode_tokens_left,
    no_replica,
    num_replicas,
)
from servegym.policy.contract import Group, ReplicaFeature, RequestFeature
from servegym.policy.costs import step_s
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

_OUT = int(ReplicaFeature["OUTSTANDING_REQUESTS"])
_PENDING = int(ReplicaFeature["PENDING_PREFILL_TOKENS"])
_RATE = int(ReplicaFeature["PREFILL_TOKENS_PER_S"])
_STEP = int(ReplicaFeature["DECODE_STEP_S"])
_SEQ = int(ReplicaFeature["DECODE_SEQ_S"])
_MAXSEQ = int(ReplicaFeature["MAX_NUM_SEQS"])
_HIT = int(ReplicaFeature["PREFIX_HIT_TOKENS"])
_QPROMPT = int(RequestFeature["PROMPT_TOKENS"])
_QPRED = int(RequestFeature["PREDICTED_OUTPUT_TOKENS"])


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
            batch = min(replicas[_OUT, r] + 1.0, replicas[_MAXSEQ, r])
            each_s = step_s(replicas[_STEP, r], replicas[_SEQ, r], batch - 1.0)
            over = max(0.0, replicas[_OUT, r] + 1.0 - replicas[_MAXSEQ, r])
            queue_s = over / batch * decode_tokens_left(replicas, r) / batch * each_s
            cost = new / replicas[_RATE, r] + queue_s + request[_QPRED] * each_s
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def mct() -> Heuristic:
    """Minimum completion time: predicted finish of this request, its own time included."""
    return Heuristic(
        name="mct",
        information="predictive",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX,
        decide=decide,
        reference="",
    )
