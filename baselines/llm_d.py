"""llm-d scorers: queue, KV use and prefix match, weighted 2 / 2 / 3."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import no_replica, num_replicas
from servegym.cluster.jit import inlined
from servegym.cluster.rng import next_uniform
from servegym.policy.contract import (
    DECODES,
    KV_CACHE_USAGE,
    NUM_WAITING,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    UP,
    Group,
)
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: Among whom the highest score is looked for: all allowed, those that only prefill, who decodes.
ALLOWED, PREFILLING, DECODING = range(3)


@inlined
def _is_among(replicas: FloatArray, mask: BoolArray, r: int, among: int) -> bool:
    if among == DECODING:
        return replicas[UP, r] > 0.5 and replicas[DECODES, r] > 0.5
    return mask[r] and (among == ALLOWED or replicas[DECODES, r] <= 0.5)


@inlined
def highest_score(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    rng: UInt64Array,
    among: int,
) -> int:
    """Return the replica with the highest weighted score, -1 if there is none; ties are drawn.

    Args:
        replicas: As a rule gets them; so are the next two.
        request: See there.
        mask: See there.
        params: Weights of queue, KV use and prefix match come first.
        rng: Random stream.
        among: `ALLOWED`, `PREFILLING` or `DECODING`.
    """
    low, high = 1e300, -1.0
    for r in range(num_replicas(mask)):
        if _is_among(replicas, mask, r, among):
            low = min(low, replicas[NUM_WAITING, r])
            high = max(high, replicas[NUM_WAITING, r])
    best, best_score, ties = -1, -1.0, 0
    for r in range(num_replicas(mask)):
        if _is_among(replicas, mask, r, among):
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
    return best


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
    best = highest_score(replicas, request, mask, params, rng, ALLOWED)
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
