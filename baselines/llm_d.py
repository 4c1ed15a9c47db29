"""llm-d scorers: queue, KV use and prefix match, weighted 2 / 2 / 3."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import no_replica, num_replicas
from servegym.cluster.rng import next_uniform
from servegym.policy.contract import (
    KV_CACHE_USAGE,
    NUM_WAITING,
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
    low, high = 1e300, -1.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            low = min(low, replicas[NUM_WAITING, r])
            high = max(high, replicas[NUM_WAITING, r])
    best, best_score, ties = -1, -1.0, 0
    for r in range(num_replicas(mask)):
        if mask[r]:
            queue = 1.0 if high <= low else (high - replicas[NUM_WAITING, r]) / (high - low)
            prefix = replicas[PREFIX_HIT_TOKENS, r] / request[PROMPT_TOKENS]
            score = (
                params[0] * queue
                + params[1] * (1.0 - replicas[KV_CACHE_USAGE, r])
                + params[2] * prefix
            )
            if best < 0 or score > best_score:
                best, best_score, ties = r, score, 1
            elif score == best_score:
                ties += 1
                if next_uniform(rng) * ties < 1.0:
                    best = r
    return best if best >= 0 else no_replica(mask)


def llm_d(queue: float = 2.0, kv: float = 2.0, prefix: float = 3.0) -> Heuristic:
    """llm-d scorers: queue, KV use and prefix match, weighted 2 / 2 / 3."""
    return Heuristic(
        name="llm-d",
        information="metric",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX,
        decide=decide,
        params=np.array([queue, kv, prefix], np.float64),
        param_names=(
            "queue",
            "kv",
            "prefix",
        ),
        reference="llm-d inference scheduler, default profile",
    )
