"""Dynamo KV router: prefill blocks less the overlap, plus decode blocks."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import no_replica, num_replicas
from servegym.cluster.rng import next_uniform
from servegym.policy.contract import (
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    Group,
)
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
    size = params[3]
    best, best_cost, ties = -1, 0.0, 0
    for r in range(num_replicas(mask)):
        if mask[r]:
            prefill = (replicas[PENDING_PREFILL_TOKENS, r] + request[PROMPT_TOKENS]) / size
            prefill = max(0.0, prefill - params[0] * replicas[PREFIX_HIT_TOKENS, r] / size)
            decode = (replicas[OUTSTANDING_PROMPT_TOKENS, r] + request[PROMPT_TOKENS]) / size
            cost = params[1] * prefill + decode + params[2] * replicas[OUTSTANDING_REQUESTS, r]
            if best < 0 or cost < best_cost:
                best, best_cost, ties = r, cost, 1
            elif cost == best_cost:
                ties += 1
                if next_uniform(rng) * ties < 1.0:
                    best = r
    return best if best >= 0 else no_replica(mask)


def dynamo(
    overlap: float = 1.0,
    prefill_scale: float = 1.0,
    per_request: float = 0.0,
    block_tokens: float = 64.0,
) -> Heuristic:
    """Dynamo KV router: prefill blocks less the overlap, plus decode blocks."""
    return Heuristic(
        name="dynamo",
        information="metric",
        needs=Group.COUNTERS | Group.PREFIX,
        decide=decide,
        params=np.array([overlap, prefill_scale, per_request, block_tokens], np.float64),
        param_names=(
            "overlap",
            "prefill_scale",
            "per_request",
            "block_tokens",
        ),
        reference="ai-dynamo kv-router, temperature 0",
    )
