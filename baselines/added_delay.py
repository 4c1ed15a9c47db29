"""Least added delay in closed form: what the choice costs this request and all others there.

Besides its own prefill and decode, a request delays every request that decodes beside it: its
prefill stretches their steps, and so does each of its tokens afterwards. The sum of these delays
is what mean latency charges for the choice.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    Group,
)
from servegym.policy.costs import added_delay_s, delay_s, step_s
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array


@inlined
def cost_s(
    replicas: FloatArray,
    request: FloatArray,
    r: int,
    tokens: float,
    prefill: float,
    decode: float,
) -> float:
    """Seconds that the choice of a replica costs.

    Args:
        replicas: Features, `float64[F, R]`.
        request: Features, `float64[G]`.
        r: The replica.
        tokens: Output tokens of the request.
        prefill: Weight of the delay by its prefill.
        decode: Weight of the delay by its tokens.
    """
    others = replicas[OUTSTANDING_REQUESTS, r]
    rate, seq_s = replicas[PREFILL_TOKENS_PER_S, r], replicas[DECODE_SEQ_S, r]
    new_s = max(0.0, request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r]) / rate
    wait_s = replicas[PENDING_PREFILL_TOKENS, r] / rate
    decode_s = tokens * step_s(replicas[DECODE_STEP_S, r], seq_s, others)
    others_s = delay_s(others, new_s, seq_s, tokens, prefill, decode)
    return added_delay_s(wait_s, new_s, decode_s, others_s)


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
            tokens = request[PREDICTED_OUTPUT_TOKENS]
            cost = cost_s(replicas, request, r, tokens, params[0], params[1])
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
