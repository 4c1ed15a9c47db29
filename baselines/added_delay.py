"""Least added delay in closed form: what the choice costs this request and all others there.

Besides its own prefill and decode, a request delays every request that decodes beside it: its
prefill stretches their steps, and so does each of its tokens afterwards. The sum of these delays
is what mean latency charges for the choice.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import Group, ReplicaFeature, RequestFeature
from servegym.policy.costs import added_delay_s, delay_s, step_s
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

_OUT = int(ReplicaFeature["OUTSTANDING_REQUESTS"])
_PENDING = int(ReplicaFeature["PENDING_PREFILL_TOKENS"])
_RATE = int(ReplicaFeature["PREFILL_TOKENS_PER_S"])
_STEP = int(ReplicaFeature["DECODE_STEP_S"])
_SEQ = int(ReplicaFeature["DECODE_SEQ_S"])
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
            others = replicas[_OUT, r]
            new_s = max(0.0, request[_QPROMPT] - replicas[_HIT, r]) / replicas[_RATE, r]
            wait_s = replicas[_PENDING, r] / replicas[_RATE, r]
            seq_s = replicas[_SEQ, r]
            decode_s = request[_QPRED] * step_s(replicas[_STEP, r], seq_s, others)
            others_s = delay_s(others, new_s, seq_s, request[_QPRED], params[0], params[1])
            cost = added_delay_s(wait_s, new_s, decode_s, others_s)
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def added_delay(prefill: float = 1.0, decode: float = 1.0) -> Heuristic:
    """Tunable: own time plus the delay that prefill and decode cause to the others there."""
    return Heuristic(
        name="added-delay",
        information="predictive",
        needs=Group.COUNTERS | Group.PREFIX,
        decide=decide,
        params=np.array([prefill, decode], np.float64),
        param_names=("prefill", "decode"),
        reference="",
    )
