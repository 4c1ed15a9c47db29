"""Least added delay that holds a request while too much prefill waits where it would go.

Where engines are short of KV memory they preempt what decodes for what they have admitted, and what
was dispatched cannot go elsewhere any more. A request that waits at the router instead goes where
room is first. Which of those on hold goes next is whoever is asked first when there is room.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.added_delay import cost_s
from servegym.baselines.choice import better, inferred, no_replica, num_replicas, own_tokens
from servegym.policy.contract import (
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    WAITED_S,
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
    best, best_cost, hold = -1, 0.0, num_replicas(mask)
    tokens = own_tokens(request, params[4])
    for r in range(hold):
        if mask[r]:
            cost = cost_s(replicas, request, r, tokens, params[0], params[1])
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    if best < 0:
        return no_replica(mask)
    waits_s = replicas[PENDING_PREFILL_TOKENS, best] / replicas[PREFILL_TOKENS_PER_S, best]
    if mask[hold] and waits_s > params[2] and request[WAITED_S] < params[3]:
        return hold
    return best


def added_delay_held(
    prefill: float = 1.0,
    decode: float = 1.0,
    wait: float = 1.0,
    most: float = 60.0,
    shrink: float = 1.0,
) -> Heuristic:
    """Tunable: `added-delay-shrink` that holds while more than `wait` s of prefill wait there."""
    return Heuristic(
        name="added-delay-held",
        information="predictive",
        needs=Group.COUNTERS | Group.PREFIX | inferred(shrink=shrink),
        decide=decide,
        params=np.array([prefill, decode, wait, most, shrink], np.float64),
        param_names=("prefill", "decode", "wait", "most", "shrink"),
        reference="",
    )
