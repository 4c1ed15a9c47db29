"""Mooncake's Conductor: shortest predicted TTFT; rejected early if a limit will be missed.

With a `threshold` it is aware of all caches: where the longest prefix that a GPU has is more than
so many times as long as a replica's own, the replica is taken to fetch the rest of it, which takes
its time on the links of both. Whether it does is up to the scenario (`kv_tiers`), which knows what
lies in hosts, too. Replicas that only decode are those that are up and may not be chosen; while
there are some, no request is let in that would decode more slowly than its limit on the best.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import better, no_replica, num_replicas, prefills_s
from servegym.cluster.jit import inlined
from servegym.errors import ConfigError
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    KV_TOKENS_PER_S,
    LINK_BUSY_S,
    OUTSTANDING_REQUESTS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
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
def _saved_s(replicas: FloatArray, r: int, source: int, threshold: float) -> float:
    """Seconds a replica saves if it fetches what of a prefix another has and it has not.

    It does so if it can, and the prefix is so many times as long there.
    """
    longest, own = replicas[PREFIX_HIT_TOKENS, source], replicas[PREFIX_HIT_TOKENS, r]
    rate = min(replicas[KV_TOKENS_PER_S, source], replicas[KV_TOKENS_PER_S, r])
    if rate == 0.0 or longest <= threshold * own:
        return 0.0
    busy_s = max(replicas[LINK_BUSY_S, source], replicas[LINK_BUSY_S, r])
    tokens = longest - own
    return tokens / replicas[PREFILL_TOKENS_PER_S, r] - (busy_s + tokens / rate)


@inlined
def shortest_ttft(
    replicas: FloatArray, request: FloatArray, mask: BoolArray, threshold: float
) -> tuple[int, float]:
    """Return the allowed replica with the shortest predicted TTFT, -1: none; and that time.

    Args:
        replicas: What is seen of them.
        request: And of the request.
        mask: Which may be chosen.
        threshold: A prefix so many times as long elsewhere is fetched; 0: none is.
    """
    source = 0
    for r in range(num_replicas(mask)):
        if replicas[PREFIX_HIT_TOKENS, r] > replicas[PREFIX_HIT_TOKENS, source]:
            source = r
    best, best_s = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            ttft_s = prefills_s(replicas, request, r)
            if threshold > 0.0:
                ttft_s -= _saved_s(replicas, r, source, threshold)
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
    best, best_s = shortest_ttft(replicas, request, mask, params[1])
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


def conductor(slack: float = 1.0, threshold: float = 0.0) -> Heuristic:
    """Mooncake's Conductor: shortest predicted TTFT; rejected early if a limit will be missed."""
    if threshold != 0.0 and not threshold >= 1.0:
        raise ConfigError(
            f"threshold of conductor must be at least 1, or 0 to fetch nothing, got {threshold}"
        )
    return Heuristic(
        name="conductor",
        information="metric",
        needs=Group.COUNTERS | Group.PREFIX | (Group.ROLES if threshold > 0.0 else Group(0)),
        decide=decide,
        params=np.array([slack, threshold], np.float64),
        param_names=("slack", "threshold"),
        reference="Mooncake (FAST'25)",
    )
