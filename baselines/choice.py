"""Picking from costs: the part every rule shares."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.rng import next_uniform
from servegym.policy.contract import GENERATED_TOKENS, OUTSTANDING_PREDICTED_TOKENS
from servegym.typing import BoolArray, FloatArray, UInt64Array


@inlined
def num_replicas(mask: BoolArray) -> int:
    """Columns that stand for replicas."""
    return mask.shape[0] - 2


@inlined
def no_replica(mask: BoolArray) -> int:
    """What is left when no replica may be chosen: to hold, else to reject."""
    hold = mask.shape[0] - 2
    return hold if mask[hold] else hold + 1


@inlined
def better(cost: float, r: int, best_cost: float, best: int) -> bool:
    """Whether a replica beats the best so far; the first of equals stays."""
    return best < 0 or cost < best_cost


@inlined
def random_allowed(mask: BoolArray, rng: UInt64Array, other_than: int) -> int:
    """Draw one of the allowed replicas but `other_than`, -1 if there is none."""
    count = 0
    for r in range(mask.shape[0] - 2):
        count += mask[r]
    apart = other_than >= 0 and mask[other_than]
    if apart:
        count -= 1
    if count == 0:
        return -1
    pick = int(next_uniform(rng) * count)
    if count == mask.shape[0] - 2 - apart:  # all are allowed: nothing to look for
        return pick + 1 if apart and pick >= other_than else pick
    for r in range(mask.shape[0] - 2):
        if mask[r] and r != other_than:
            if pick == 0:
                return r
            pick -= 1
    return -1


@inlined
def decode_tokens_left(replicas: FloatArray, r: int) -> float:
    """Predicted output tokens that the outstanding requests of a replica still want."""
    return max(0.0, replicas[OUTSTANDING_PREDICTED_TOKENS, r] - replicas[GENERATED_TOKENS, r])
