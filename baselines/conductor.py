"""Mooncake's Conductor: shortest predicted TTFT; rejected early if a limit will be missed.

The time to fetch a prefix from another replica's cache is left out: none is fetched here. Replicas
that only decode are those that are up and may not be chosen; while there are some, no request is
let in that would decode more slowly than its limit on the best of them.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas, prefills_s
from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    OUTSTANDING_REQUESTS,
    TPOT_SLO_S,
    TTFT_SLO_S,
    UP,
    Group,
)
from servegym.policy.costs import step_s
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: Stands for the time per token where nobody only decodes.
NO_DECODER_S = 1e300


@inlined
def shortest_ttft(replicas: FloatArray, request: FloatArray, mask: BoolArray) -> tuple[int, float]:
    """Return the allowed replica with the shortest predicted TTFT, -1: none; and that time."""
    best, best_s = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            ttft_s = prefills_s(replicas, request, r)
            if better(ttft_s, r, best_s, best):
                best, best_s = r, ttft_s
    return best, best_s


@inlined
def rejected(request: FloatArray, slack: float, ttft_s: float, tpot_s: float) -> bool:
    """Whether a limit, times the slack, will be missed; a slack of 0 lets all in."""
    late = 0.0 < slack * request[TTFT_SLO_S] < ttft_s
    slow = 0.0 < slack * request[TPOT_SLO_S] < tpot_s < NO_DECODER_S
    return late or slow


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
    best, best_s = shortest_ttft(replicas, request, mask)
    if best < 0:
        return no_replica(mask)
    tpot_s = NO_DECODER_S
    for r in range(num_replicas(mask)):
        if not mask[r] and replicas[UP, r] > 0.0:
            others = replicas[OUTSTANDING_REQUESTS, r]
            each_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
            tpot_s = min(tpot_s, each_s)
    reject = num_replicas(mask) + 1
    return reject if mask[reject] and rejected(request, params[0], best_s, tpot_s) else best


def conductor(slack: float = 1.0) -> Heuristic:
    """Mooncake's Conductor: shortest predicted TTFT; rejected early if a limit will be missed."""
    return Heuristic(
        name="conductor",
        information="metric",
        needs=Group.COUNTERS | Group.PREFIX,
        decide=decide,
        params=np.array([slack], np.float64),
        param_names=("slack",),
        reference="Mooncake (FAST'25), without fetching prefixes",
    )
