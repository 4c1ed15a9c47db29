"""HexGen workload balance: trade the speed on this request against the work outstanding."""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import (
    decode_tokens_left,
    inferred,
    no_replica,
    num_replicas,
    own_tokens,
)
from servegym.cluster.jit import inlined
from servegym.policy.contract import (
    DECODE_STEP_S,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    PROMPT_TOKENS,
    Group,
)
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array


@inlined
def _own_s(replicas: FloatArray, request: FloatArray, r: int, shrink: float) -> float:
    """Seconds of this request alone on a replica."""
    return (
        request[PROMPT_TOKENS] / replicas[PREFILL_TOKENS_PER_S, r]
        + own_tokens(request, shrink) * replicas[DECODE_STEP_S, r]
    )


@inlined
def _work_s(replicas: FloatArray, r: int, shrink: float) -> float:
    """Seconds of the outstanding work there, its requests one by one."""
    prefill_s = replicas[PENDING_PREFILL_TOKENS, r] / replicas[PREFILL_TOKENS_PER_S, r]
    return prefill_s + decode_tokens_left(replicas, r, shrink) * replicas[DECODE_STEP_S, r]


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
    first = -1
    for r in range(num_replicas(mask)):
        if mask[r]:
            first = r
            break
    if first < 0:
        return no_replica(mask)
    best, best_score = -1, 0.0
    own_0, work_0 = _own_s(replicas, request, first, params[1]), _work_s(replicas, first, params[1])
    if work_0 <= 0.0:
        return first
    for r in range(num_replicas(mask)):
        if mask[r]:
            own, work = _own_s(replicas, request, r, params[1]), _work_s(replicas, r, params[1])
            score = params[0] * own_0 / own - (1.0 - params[0]) * work / work_0
            if best < 0 or score > best_score:
                best, best_score = r, score
    return best


def hexgen(alpha: float = 0.2, shrink: float = 0.0) -> Heuristic:
    """HexGen workload balance: trade the speed on this request against the work outstanding."""
    return Heuristic(
        name="hexgen",
        information="predictive",
        needs=Group.COUNTERS | Group.METRICS | inferred(shrink=shrink, left=shrink),
        decide=decide,
        params=np.array([alpha, shrink], np.float64),
        param_names=("alpha", "shrink"),
        reference="HexGen-Text2SQL, outstanding work, no per-GPU factors",
    )
