"""SGLang cache-aware: balance when loads are far apart, else follow the longest prefix.

Without a match above the threshold the replica with the smallest prefix tree is taken; here
that is the one with the fewest prompt tokens sent so far.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from servegym.baselines.choice import no_replica, num_replicas
from servegym.policy.contract import OUTSTANDING_REQUESTS, PREFIX_HIT_TOKENS, PROMPT_TOKENS, Group
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
    most, least, idle = -1.0, 1e300, -1
    hit, hit_at, small = -1.0, -1, -1
    for r in range(num_replicas(mask)):
        if mask[r]:
            load = replicas[OUTSTANDING_REQUESTS, r]
            most = max(most, load)
            if load < least:
                least, idle = load, r
            if replicas[PREFIX_HIT_TOKENS, r] > hit:
                hit, hit_at = replicas[PREFIX_HIT_TOKENS, r], r
            if small < 0 or memory[r] < memory[small]:
                small = r
    if idle < 0:
        return no_replica(mask)
    if most - least > params[1] and most > params[2] * least:
        chosen = idle
    elif hit > params[0] * request[PROMPT_TOKENS]:
        chosen = hit_at
    else:
        chosen = small
    memory[chosen] += request[PROMPT_TOKENS] - replicas[PREFIX_HIT_TOKENS, chosen]
    return chosen


def sglang(
    cache_threshold: float = 0.3, balance_abs: float = 64.0, balance_rel: float = 1.5
) -> Heuristic:
    """SGLang cache-aware: balance when loads are far apart, else follow the longest prefix."""
    return Heuristic(
        name="sglang",
        information="metric",
        needs=Group.COUNTERS | Group.PREFIX,
        decide=decide,
        params=np.array([cache_threshold, balance_abs, balance_rel], np.float64),
        param_names=(
            "cache_threshold",
            "balance_abs",
            "balance_rel",
        ),
        memory_size=1024,
        reference="sgl-router cache_aware",
    )


def sglang_older(
    cache_threshold: float = 0.5, balance_abs: float = 32.0, balance_rel: float = 1.0001
) -> Heuristic:
    """SGLang cache-aware with the defaults of its older router."""
    made = sglang(cache_threshold, balance_abs, balance_rel)
    return replace(made, name="sglang-older", reference="sgl-router cache_aware, older defaults")
