"""Splitwise's pools: least memory held of those that only decode, if it fits; else mixed."""

from __future__ import annotations

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    KV_CACHE_USAGE,
    KV_CAPACITY_TOKENS,
    PREFILLS,
    PROMPT_TOKENS,
    Group,
)
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array


@inlined
def _held_tokens(replicas: FloatArray, r: int) -> float:
    return replicas[KV_CACHE_USAGE, r] * replicas[KV_CAPACITY_TOKENS, r]


@inlined
def _least_held(replicas: FloatArray, mask: BoolArray, prefills: bool) -> int:
    """Return the allowed replica of a pool that holds the least memory, -1: none."""
    best, best_cost = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r] and (replicas[PREFILLS, r] > 0.5) == prefills:
            cost = _held_tokens(replicas, r)
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
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
    own = _least_held(replicas, mask, False)
    mixed = _least_held(replicas, mask, True)
    if mixed < 0 or own < 0:
        best = max(mixed, own)
        return best if best >= 0 else no_replica(mask)
    for r in (own, mixed):
        if _held_tokens(replicas, r) + request[PROMPT_TOKENS] <= replicas[KV_CAPACITY_TOKENS, r]:
            return r
    return mixed if _held_tokens(replicas, mixed) < _held_tokens(replicas, own) else own


def splitwise_place() -> Heuristic:
    """Splitwise's pools: least memory held of those that only decode, if it fits; else mixed."""
    return Heuristic(
        name="splitwise",
        information="metric",
        needs=Group.COUNTERS | Group.METRICS | Group.ROLES,
        decide=decide,
        reference="Splitwise (ISCA'24), without lending between pools",
    )
