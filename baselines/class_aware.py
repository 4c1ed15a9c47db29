"""Least harm to limits: the delay a choice adds, and prices on the limits that it breaks.

The request's own TTFT and TPOT at a replica are priced if they are over a share of their limits,
and so is each request there that would stay within that share of its TPOT limit without this one
and would not with it. A request that costs too much everywhere is rejected.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.added_delay import cost_s
from servegym.baselines.choice import better, no_replica, num_replicas, prefills_s, pushed_over
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    EXPECTED_TOKENS,
    OUTSTANDING_REQUESTS,
    STEP_TIME_RATIO,
    TPOT_SLO_S,
    TTFT_SLO_S,
    WAITED_S,
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
    tokens = request[EXPECTED_TOKENS]
    for r in range(num_replicas(mask)):
        if mask[r]:
            ratio, others = replicas[STEP_TIME_RATIO, r], replicas[OUTSTANDING_REQUESTS, r]
            each_s = ratio * step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
            ttft_s = request[WAITED_S] + ratio * prefills_s(replicas, request, r) + each_s
            cost = ratio * cost_s(replicas, request, r, tokens, params[0], params[1])
            if ttft_s > params[2] * request[TTFT_SLO_S]:
                cost += params[3]
            if each_s > params[4] * request[TPOT_SLO_S]:
                cost += params[5]
            cost += params[6] * pushed_over(replicas, r, params[4])
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    reject = mask.shape[0] - 1
    if best >= 0 and best_cost > params[7] and mask[reject]:
        return reject
    return best if best >= 0 else no_replica(mask)


def class_aware(
    prefill: float = 1.0,
    decode: float = 1.0,
    ttft: float = 0.5,
    late: float = 10.0,
    tpot: float = 0.5,
    slow: float = 10.0,
    pushed: float = 10.0,
    most: float = 20.0,
) -> Heuristic:
    """Tunable: `added-delay-inferred` with prices on limits that it breaks; may reject."""
    return Heuristic(
        name="class-aware",
        information="predictive",
        needs=Group.COUNTERS | Group.PREFIX | Group.STEP_TIMES | Group.LENGTHS | Group.LIMITS,
        decide=decide,
        params=np.array([prefill, decode, ttft, late, tpot, slow, pushed, most], np.float64),
        param_names=("prefill", "decode", "ttft", "late", "tpot", "slow", "pushed", "most"),
        reference="",
    )
