"""llm-d scorers: queue, KV use and prefix match, weighted 2 / 2 / 3.

Beside these three, the default profile's, there are the scorers of load: `load-aware-scorer`,
`running-requests-size-scorer` and `active-request-scorer`. Each scores from 0 to 1, as the plugins
of llm-d's inference scheduler do.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import no_replica, num_replicas
from servegym.cluster.jit import inlined
from servegym.cluster.rng import next_uniform
from servegym.policy.contract import (
    DECODES,
    KV_CACHE_USAGE,
    NUM_RUNNING,
    NUM_WAITING,
    OUTSTANDING_REQUESTS,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    UP,
    Group,
)
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array

#: Among whom the highest score is looked for: all allowed, those that only prefill, who decodes.
ALLOWED, PREFILLING, DECODING = range(3)
#: Places of the parameters of all scorers: weights, what some of them have besides, and whether
#: the choice is drawn with chances in proportion to the scores, not the highest.
QUEUE, KV, PREFIX, LOAD, RUNNING, ACTIVE, LOAD_THRESHOLD, IDLE, BUSY, DRAWN = range(10)
SCORER_PARAMETERS = (
    "queue",
    "kv",
    "prefix",
    "load",
    "running",
    "active",
    "load_threshold",
    "idle",
    "busy",
    "drawn",
)


@inlined
def _is_among(replicas: FloatArray, mask: BoolArray, r: int, among: int) -> bool:
    if among == DECODING:
        return replicas[UP, r] > 0.5 and replicas[DECODES, r] > 0.5
    return mask[r] and (among == ALLOWED or replicas[DECODES, r] <= 0.5)


@inlined
def _below_highest(value: float, low: float, high: float) -> float:
    """How far a value is below the highest, as a share of the spread; 1 if all are equal."""
    return 1.0 if high <= low else (high - value) / (high - low)


@inlined
def _load_score(waiting: float, threshold: float) -> float:
    """Return 0.5 for an empty queue, and less in proportion up to a threshold."""
    return 0.5 * (1.0 - min(waiting, threshold) / threshold)


@inlined
def _active_score(requests: float, most: float, idle: float, busy: float) -> float:
    """Return 1 for a replica that counts as idle, and else at most `busy`."""
    return 1.0 if requests <= idle else (most - requests) / most * busy


@inlined
def highest_score(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    rng: UInt64Array,
    among: int,
) -> int:
    """Return the replica with the highest weighted score, or one drawn by score; -1: none.

    Equal scores are drawn among.

    Args:
        replicas: As a rule gets them; so are the next two.
        request: See there.
        mask: See there.
        params: Those of `SCORER_PARAMETERS` come first.
        rng: Random stream.
        among: `ALLOWED`, `PREFILLING` or `DECODING`.
    """
    low, high = 1e300, -1.0
    fewest, most, most_active = 1e300, -1.0, 0.0
    for r in range(num_replicas(mask)):
        # requests in progress are compared with those of all replicas, allowed or not
        most_active = max(most_active, replicas[OUTSTANDING_REQUESTS, r])
        if _is_among(replicas, mask, r, among):
            low = min(low, replicas[NUM_WAITING, r])
            high = max(high, replicas[NUM_WAITING, r])
            fewest = min(fewest, replicas[NUM_RUNNING, r])
            most = max(most, replicas[NUM_RUNNING, r])
    best, best_score, ties, total = -1, -1.0, 0, 0.0
    for r in range(num_replicas(mask)):
        if _is_among(replicas, mask, r, among):
            waiting = replicas[NUM_WAITING, r]
            active = replicas[OUTSTANDING_REQUESTS, r]
            score = (
                params[QUEUE] * _below_highest(waiting, low, high)
                + params[KV] * (1.0 - replicas[KV_CACHE_USAGE, r])
                + params[PREFIX] * (replicas[PREFIX_HIT_TOKENS, r] / request[PROMPT_TOKENS])
                + params[LOAD] * _load_score(waiting, params[LOAD_THRESHOLD])
                + params[RUNNING] * _below_highest(replicas[NUM_RUNNING, r], fewest, most)
                + params[ACTIVE] * _active_score(active, most_active, params[IDLE], params[BUSY])
            )
            if params[DRAWN] > 0.0:
                ties += 1
                total += score
                chance = score / total if total > 0.0 else 1.0 / ties
                if next_uniform(rng) < chance:
                    best = r
            elif best < 0 or score > best_score:
                best, best_score, ties = r, score, 1
            elif score == best_score:
                ties += 1
                if next_uniform(rng) * ties < 1.0:
                    best = r
    return best


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
    best = highest_score(replicas, request, mask, params, rng, ALLOWED)
    return best if best >= 0 else no_replica(mask)


def llm_d(
    queue: float = 2.0,
    kv: float = 2.0,
    prefix: float = 3.0,
    load: float = 0.0,
    running: float = 0.0,
    active: float = 0.0,
    load_threshold: float = 128.0,
    idle: float = 0.0,
    busy: float = 1.0,
    drawn: float = 0.0,
) -> Heuristic:
    """llm-d scorers: queue, KV use and prefix match, weighted 2 / 2 / 3."""
    scores = [queue, kv, prefix, load, running, active, load_threshold, idle, busy, drawn]
    return Heuristic(
        name="llm-d",
        information="metric",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX,
        decide=decide,
        params=np.array(scores, np.float64),
        param_names=SCORER_PARAMETERS,
        reference="llm-d inference scheduler, default profile",
    )
