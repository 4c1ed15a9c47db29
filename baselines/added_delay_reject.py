"""Least added delay, and a rejection where no replica is likely to keep the request's limits."""

from __future__ import annotations

import numpy as np

from servegym.baselines.added_delay import cost_s
from servegym.baselines.choice import (
    better,
    inferred,
    no_replica,
    num_replicas,
    own_tokens,
    prefills_s,
)
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    OUTSTANDING_REQUESTS,
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
    best, best_cost, least_ttft_s, least_tpot_s = -1, 0.0, np.inf, np.inf
    tokens = own_tokens(request, params[4])
    for r in range(num_replicas(mask)):
        if mask[r]:
            others = replicas[OUTSTANDING_REQUESTS, r]
            each_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
            ttft_s = request[WAITED_S] + prefills_s(replicas, request, r) + each_s
            least_ttft_s, least_tpot_s = min(least_ttft_s, ttft_s), min(least_tpot_s, each_s)
            cost = cost_s(replicas, request, r, tokens, params[0], params[1])
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    if best < 0:
        return no_replica(mask)
    late = least_ttft_s > params[2] * request[TTFT_SLO_S]
    slow = least_tpot_s > params[3] * request[TPOT_SLO_S]
    reject = mask.shape[0] - 1
    return reject if (late or slow) and mask[reject] else best


def added_delay_reject(
    prefill: float = 1.0,
    decode: float = 1.0,
    ttft: float = 0.5,
    tpot: float = 0.7,
    shrink: float = 0.0,
) -> Heuristic:
    """`added-delay` that rejects if the least TTFT or TPOT is over a share of its limit."""
    return Heuristic(
        name="added-delay-reject",
        information="predictive",
        needs=Group.COUNTERS | Group.PREFIX | inferred(shrink=shrink),
        decide=decide,
        params=np.array([prefill, decode, ttft, tpot, shrink], np.float64),
        param_names=("prefill", "decode", "ttft", "tpot", "shrink"),
        reference="",
    )
