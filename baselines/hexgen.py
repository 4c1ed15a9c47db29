"""HexGen workload balance: trade the speed on this request against the work outstanding."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import decode_tokens_left, no_replica, num_replicas
from servegym.policy.contract import Group, ReplicaFeature, RequestFeature
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

_PENDING = int(ReplicaFeature["PENDING_PREFILL_TOKENS"])
_RATE = int(ReplicaFeature["PREFILL_TOKENS_PER_S"])
_STEP = int(ReplicaFeature["DECODE_STEP_S"])
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
    first = -1
    for r in range(num_replicas(mask)):
        if mask[r]:
            first = r
            break
    if first < 0:
        return no_replica(mask)
    best, best_score = -1, 0.0
    own_0 = request[_QPROMPT] / replicas[_RATE, first] + request[_QPRED] * replicas[_STEP, first]
    work_0 = replicas[_PENDING, first] / replicas[_RATE, first]
    work_0 += decode_tokens_left(replicas, first) * replicas[_STEP, first]
    if work_0 <= 0.0:
        return first
    for r in range(num_replicas(mask)):
        if mask[r]:
            own = request[_QPROMPT] / replicas[_RATE, r] + request[_QPRED] * replicas[_STEP, r]
            work = replicas[_PENDING, r] / replicas[_RATE, r]
            work += decode_tokens_left(replicas, r) * replicas[_STEP, r]
            score = params[0] * own_0 / own - (1.0 - params[0]) * work / work_0
            if best < 0 or score > best_score:
                best, best_score = r, score
    return best


def hexgen(alpha: float = 0.2) -> Heuristic:
    """HexGen workload balance: trade the speed on this request against the work outstanding."""
    return Heuristic(
        name="hexgen",
        information="predictive",
        needs=Group.COUNTERS | Group.METRICS,
        decide=decide,
        params=np.array([alpha], np.float64),
        param_names=("alpha",),
        reference="HexGen-Text2SQL, outstanding work, no per-GPU factors",
    )
