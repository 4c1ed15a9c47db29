"""Least added delay with what a router infers: lengths as learnt, times as lately observed.

Predicted lengths are off, and a rule that multiplies by them trusts the extremes too much: the mean
length of requests so predicted is the better number. Known rates are off where replicas are slow
for a while: all times there are as much longer as its steps have been.

What of a prompt is computed anew also takes the room of prefixes that others come back for, where
sessions are long and memory is short: `displaced` prices it, by its share of the replica's memory.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.added_delay import cost_s
from servegym.baselines.choice import better, inferred, no_replica, num_replicas, own_tokens
from servegym.policy.contract import (
    KV_CAPACITY_TOKENS,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    STEP_TIME_RATIO,
    Group,
)
from servegym.policy.costs import displaced_s
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
    tokens = own_tokens(request, params[2])
    for r in range(num_replicas(mask)):
        if mask[r]:
            cost = cost_s(replicas, request, r, tokens, params[0], params[1])
            if params[3] > 0.0:
                cost *= replicas[STEP_TIME_RATIO, r] ** params[3]
            if params[4] > 0.0:
                new = max(0.0, request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r])
                cost += displaced_s(new, max(replicas[KV_CAPACITY_TOKENS, r], 1.0), params[4])
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def added_delay_inferred(
    prefill: float = 1.0,
    decode: float = 1.0,
    shrink: float = 1.0,
    observed: float = 1.0,
    displaced: float = 0.0,
) -> Heuristic:
    """`added-delay` with expected lengths and observed step times."""
    return Heuristic(
        name="added-delay-inferred",
        information="predictive",
        needs=Group.COUNTERS | Group.PREFIX | inferred(shrink=shrink, observed=observed),
        decide=decide,
        params=np.array([prefill, decode, shrink, observed, displaced], np.float64),
        param_names=("prefill", "decode", "shrink", "observed", "displaced"),
        reference="",
    )


def added_delay_shrink(
    prefill: float = 1.0,
    decode: float = 1.0,
    shrink: float = 1.0,
    observed: float = 0.0,
    displaced: float = 0.0,
) -> Heuristic:
    """`added-delay` with lengths as expected: given predictions, as learnt from ended requests."""
    return added_delay_inferred(prefill, decode, shrink, observed, displaced)


def added_delay_observed(
    prefill: float = 1.0,
    decode: float = 1.0,
    shrink: float = 0.0,
    observed: float = 1.0,
    displaced: float = 0.0,
) -> Heuristic:
    """`added-delay` with times as long as each replica's steps have lately been."""
    return added_delay_inferred(prefill, decode, shrink, observed, displaced)
