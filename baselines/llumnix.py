"""Llumnix freeness: free KV blocks per running request."""

from __future__ import annotations

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.cluster.pairing import free_per_request
from servegym.policy.contract import (
    KV_CACHE_USAGE,
    KV_CAPACITY_TOKENS,
    NUM_RUNNING,
    NUM_WAITING,
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_REQUESTS,
    RELATIVE_SPEED,
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
    best, best_cost = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            free = replicas[KV_CAPACITY_TOKENS, r] * (1.0 - replicas[KV_CACHE_USAGE, r])
            mean = replicas[OUTSTANDING_PROMPT_TOKENS, r] / max(
                1.0, replicas[OUTSTANDING_REQUESTS, r]
            )
            running, waiting = replicas[NUM_RUNNING, r], replicas[NUM_WAITING, r]
            cost = (
                -free_per_request(free, mean, running, waiting)
                if running + waiting > 0.0
                else -1e12 * replicas[RELATIVE_SPEED, r] + replicas[OUTSTANDING_REQUESTS, r]
            )
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def llumnix() -> Heuristic:
    """Llumnix freeness: free KV blocks per running request."""
    return Heuristic(
        name="llumnix",
        information="metric",
        needs=Group.COUNTERS | Group.METRICS,
        decide=decide,
        reference="Llumnix, dispatch part; the head of the queue wants a mean prompt",
    )
