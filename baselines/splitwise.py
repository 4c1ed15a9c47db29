"""Splitwise's pools: fewest pending prompt tokens of those that only prefill, else a mixed one.

A mixed replica does all of a request here; Splitwise may let it do one half. It also lends machines
of the other pool to whoever is short of its own, which roles that do not change cannot show.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.cluster.jit import inlined
from servegym.policy.contract import DECODES, PENDING_PREFILL_TOKENS, PROMPT_TOKENS, Group
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array


@inlined
def _least_pending(replicas: FloatArray, mask: BoolArray, decodes: bool) -> int:
    """Return the allowed replica of a pool with the fewest pending prompt tokens, -1: none."""
    best, best_cost = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r] and (replicas[DECODES, r] > 0.5) == decodes:
            cost = replicas[PENDING_PREFILL_TOKENS, r]
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best


@inlined
def _has_room(replicas: FloatArray, request: FloatArray, r: int, most_tokens: float) -> bool:
    """Whether a replica has nothing to prefill, or stays below the most that may be pending."""
    pending = replicas[PENDING_PREFILL_TOKENS, r]
    return pending == 0.0 or pending + request[PROMPT_TOKENS] <= most_tokens


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
    own = _least_pending(replicas, mask, False)
    if own >= 0 and _has_room(replicas, request, own, params[0]):
        return own
    mixed = _least_pending(replicas, mask, True)
    if mixed < 0 or own < 0:
        best = max(mixed, own)
        return best if best >= 0 else no_replica(mask)
    if _has_room(replicas, request, mixed, params[0]):
        return mixed
    busier = replicas[PENDING_PREFILL_TOKENS, mixed] < replicas[PENDING_PREFILL_TOKENS, own]
    return mixed if busier else own


def splitwise(max_pending_tokens: float = 8192.0) -> Heuristic:
    """Splitwise's pools: fewest pending prompt tokens of those that only prefill, else mixed."""
    return Heuristic(
        name="splitwise",
        information="metric",
        needs=Group.COUNTERS | Group.ROLES,
        decide=decide,
        params=np.array([max_pending_tokens], np.float64),
        param_names=("max_pending_tokens",),
        reference="Splitwise (ISCA'24), without lending between pools",
    )
