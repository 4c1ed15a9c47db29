"""Scores of choices in a fleet in which requests are placed: what a search gives weights to.

A choice is described by some terms, whether it is a dispatch or a placing, and its cost is their
weighted sum: one set of weights for dispatches, one for placings. Each term is about one thing that
somebody who sends requests around would look at, in logarithms or between 0 and 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    ARRIVING_TOKENS,
    DECODE_SEQ_S,
    DECODE_STEP_S,
    DECODES,
    HAS_PREFILL,
    KV_CACHE_USAGE,
    KV_TOKENS_PER_S,
    LINK_BUSY_S,
    NUM_HOLDING,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    STEP_TIME_RATIO,
    TPOT_SLO_S,
    TTFT_SLO_S,
    UP,
    WAITED_S,
    Group,
)
from servegym.policy.costs import step_s
from servegym.policy.placed import Placed
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: What the weights are of, in their order.
TERMS = (
    "prefill_only",  # 1 where a request only is prefilled
    "log_ttft",  # of the time to the first token as foreseen, over its limit
    "late",  # about 1 where that is above the limit
    "log_tpot",  # of the step time where it decodes, over the limit
    "slow",  # about 1 where that is above the limit
    "delays",  # seconds of others that its prefill takes
    "kv_usage",
    "holding",  # requests beside the running ones that hold memory there
    "link_busy",  # until its link is free
    "arriving",  # seconds that the KV takes that is to come there
    "cached",  # share of the prompt
)
NUM_TERMS = len(TERMS)
#: Raised whenever a term changes.
PLACED_SCHEMA_VERSION = 1
NEEDS = Group.COUNTERS | Group.METRICS | Group.PREFIX | Group.STEP_TIMES | Group.ROLES

#: How sharply a limit is one.
_SHARPNESS = 8.0


@inlined
def _over(ratio: float) -> float:
    return 1.0 / (1.0 + math.exp(min(50.0, _SHARPNESS * (1.0 - ratio))))


@inlined
def _step_s(replicas: FloatArray, r: int) -> float:
    """Seconds of a step of a replica that decodes one more."""
    others = replicas[OUTSTANDING_REQUESTS, r]
    alone_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
    return replicas[STEP_TIME_RATIO, r] * alone_s


@inlined
def _cost(
    replicas: FloatArray,
    request: FloatArray,
    r: int,
    placed: bool,
    elsewhere_s: float,
    weights: FloatArray,
) -> float:
    """Weighted sum of the terms of a choice; `elsewhere_s` is the best step time of a decoder."""
    prompt = request[PROMPT_TOKENS]
    new = max(0.0, prompt - replicas[PREFIX_HIT_TOKENS, r])
    rate, decodes = replicas[KV_TOKENS_PER_S, r], replicas[DECODES, r] > 0.5
    ttft_s, own_s, arriving_s = request[WAITED_S], 0.0, 0.0
    if rate > 0.0:
        arriving_s = replicas[ARRIVING_TOKENS, r] / rate
    if not placed:
        own_s = replicas[STEP_TIME_RATIO, r] * new / replicas[PREFILL_TOKENS_PER_S, r]
        ttft_s += own_s + replicas[PENDING_PREFILL_TOKENS, r] / replicas[PREFILL_TOKENS_PER_S, r]
    if rate > 0.0 and (placed or not decodes):
        ttft_s += replicas[LINK_BUSY_S, r] + new / rate
    each_s = _step_s(replicas, r) if decodes else elsewhere_s
    first, each = ttft_s / request[TTFT_SLO_S], each_s / request[TPOT_SLO_S]
    cost = weights[0] * (0.0 if decodes else 1.0)
    cost += weights[1] * math.log(first + 1e-3) + weights[2] * _over(first)
    cost += weights[3] * math.log(each + 1e-3) + weights[4] * _over(each)
    cost += weights[5] * math.log(1.0 + replicas[OUTSTANDING_REQUESTS, r] * own_s)
    cost += weights[6] * replicas[KV_CACHE_USAGE, r]
    cost += weights[7] * math.log(1.0 + replicas[NUM_HOLDING, r])
    cost += weights[8] * math.log(1.0 + 10.0 * replicas[LINK_BUSY_S, r])
    cost += weights[9] * math.log(1.0 + 10.0 * arriving_s)
    return cost - weights[10] * (prompt - new) / prompt


@rule
def decide(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Choose what costs least; see `policy.rule`."""
    width = mask.shape[0] - 2
    placed, elsewhere_s = False, math.inf
    for r in range(width):
        placed |= replicas[HAS_PREFILL, r] > 0.5
        if replicas[UP, r] > 0.5 and replicas[DECODES, r] > 0.5:
            elsewhere_s = min(elsewhere_s, _step_s(replicas, r))
    if elsewhere_s == math.inf:
        elsewhere_s = request[TPOT_SLO_S]
    best, least = -1, 0.0
    for r in range(width):
        if mask[r]:
            cost = _cost(replicas, request, r, placed, elsewhere_s, params)
            if best < 0 or cost < least:
                best, least = r, cost
    if mask[width + 1] and (best < 0 or least > params[params.shape[0] - 1]):
        return width + 1
    return best if best >= 0 else width


class PlacedWeights(NamedTuple):
    """What a search has found.

    Attributes:
        dispatch: Weights of `TERMS`, then the cost of a rejection, `float64[NUM_TERMS + 1]`.
        place: Weights of `TERMS`, `float64[NUM_TERMS]`.
    """

    dispatch: FloatArray
    place: FloatArray


def placed_policy(weights: PlacedWeights, name: str) -> Placed:
    """Return the policy that takes both decisions by weights."""
    # no placing is rejected
    place = _scored(np.append(weights.place, np.inf), f"{name}, placing")
    return Placed(_scored(weights.dispatch, name), place, name, learned=True)


def _scored(weights: FloatArray, name: str) -> Heuristic:
    return Heuristic(
        name=name,
        information="predictive",
        needs=NEEDS,
        decide=decide,
        params=np.ascontiguousarray(weights, np.float64),
        param_names=(*TERMS, "rejected"),
    )
