"""Picking from costs: the part every rule shares."""

from __future__ import annotations

from servegym.cluster.jit import inlined
from servegym.cluster.rng import next_uniform
from servegym.policy.contract import (
    EXPECTED_TOKENS,
    EXPECTED_TOKENS_LEFT,
    GENERATED_TOKENS,
    MARGINS,
    OUTSTANDING_PREDICTED_TOKENS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    PUSHED_OVER_40,
    Group,
)
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
def own_tokens(request: FloatArray, shrink: float) -> float:
    """Output tokens of the request: as predicted, or so far towards what is expected of it."""
    predicted = request[PREDICTED_OUTPUT_TOKENS]
    if shrink == 0.0:  # what is expected was not asked for
        return predicted
    return predicted + shrink * (request[EXPECTED_TOKENS] - predicted)


@inlined
def decode_tokens_left(replicas: FloatArray, r: int, shrink: float) -> float:
    """Output tokens that the outstanding requests of a replica still want, as in `own_tokens`."""
    left = max(0.0, replicas[OUTSTANDING_PREDICTED_TOKENS, r] - replicas[GENERATED_TOKENS, r])
    if shrink == 0.0:
        return left
    return left + shrink * (replicas[EXPECTED_TOKENS_LEFT, r] - left)


@inlined
def prefills_s(replicas: FloatArray, request: FloatArray, r: int) -> float:
    """Seconds of the prefills that wait at a replica and of the request's own."""
    new = max(0.0, request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r])
    return (replicas[PENDING_PREFILL_TOKENS, r] + new) / replicas[PREFILL_TOKENS_PER_S, r]


@inlined
def pushed_over(replicas: FloatArray, r: int, margin: float) -> float:
    """Requests that the choice pushes over a share of their TPOT limits, from margin to margin."""
    k = 1
    while k < len(MARGINS) - 1 and MARGINS[k] < margin:
        k += 1
    low, high = replicas[PUSHED_OVER_40 + k - 1, r], replicas[PUSHED_OVER_40 + k, r]
    share = (margin - MARGINS[k - 1]) / (MARGINS[k] - MARGINS[k - 1])
    return low + min(max(share, 0.0), 1.0) * (high - low)


def inferred(*, shrink: float = 0.0, left: float = 0.0, observed: float = 0.0) -> Group:
    """Groups that a rule needs besides those it always does.

    Args:
        shrink: How far it goes towards the length that is expected of the request,
        left: and of those that are there.
        observed: How far it goes by observed step times.
    """
    needs = Group.LENGTHS if shrink > 0.0 else Group(0)
    needs |= Group.LIMITS if left > 0.0 else Group(0)
    return needs | (Group.STEP_TIMES if observed > 0.0 else Group(0))
