"""Llumnix freeness: free KV blocks per running request."""

from __future__ import annotations

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import Group, ReplicaFeature
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

_OUT = int(ReplicaFeature["OUTSTANDING_REQUESTS"])
_PROMPT = int(ReplicaFeature["OUTSTANDING_PROMPT_TOKENS"])
_SPEED = int(ReplicaFeature["RELATIVE_SPEED"])
_CAP = int(ReplicaFeature["KV_CAPACITY_TOKENS"])
_RUN = int(ReplicaFeature["NUM_RUNNING"])
_WAIT = int(ReplicaFeature["NUM_WAITING"])
_KV = int(ReplicaFeature["KV_CACHE_USAGE"])


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
            free = replicas[_CAP, r] * (1.0 - replicas[_KV, r])
            mean = replicas[_PROMPT, r] / max(1.0, replicas[_OUT, r])
            free -= mean if replicas[_WAIT, r] > 0.0 else 0.0
            count = replicas[_RUN, r] + (1.0 if replicas[_WAIT, r] > 0.0 else 0.0)
            cost = -free / count if count > 0.0 else -1e12 * replicas[_SPEED, r] + replicas[_OUT, r]
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
