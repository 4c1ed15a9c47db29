"""Mooncake's Conductor: shortest predicted TTFT; rejected early if a limit will be missed.

The time to fetch a prefix from another replica's cache is left out: none is fetched here. Replicas
that only decode are those that are up and may not be chosen; while there are some, no request is
let in that would decode more slowly than its limit on the best of them.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
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
    best, best_s, tpot_s = -1, 0.0, NO_DECODER_S
    for r in range(num_replicas(mask)):
        if mask[r]:
            own = max(0.0, request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, r])
            tokens = replicas[PENDING_PREFILL_TOKENS, r] + own
            ttft_s = tokens / replicas[PREFILL_TOKENS_PER_S, r]
            if better(ttft_s, r, best_s, best):
                best, best_s = r, ttft_s
        elif replicas[UP, r] > 0.0:
            others = replicas[OUTSTANDING_REQUESTS, r]
            each_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
            tpot_s = min(tpot_s, each_s)
    if best < 0:
        return no_replica(mask)
    reject = num_replicas(mask) + 1
    late = 0.0 < params[0] * request[TTFT_SLO_S] < best_s
    slow = 0.0 < params[0] * request[TPOT_SLO_S] < tpot_s < NO_DECODER_S
    return reject if mask[reject] and (late or slow) else best


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
