"""Scores of what may become of the KV of an ended turn: what a search gives weights to.

Each answer has a linear score in some terms, and the highest is given; that of `LEAVE` is 0. How
long `KEEP` keeps is the exponential of another one. With some weights this is one of the rules
`lru`, `ttl`, `lognormal` or `offload-within`, choice for choice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import kernel
from servegym.cluster.state import DROP, KEEP, LEAVE, OFFLOAD
from servegym.policy.retention import RetentionRule, Turn
from servegym.typing import FloatArray

#: What the weights are of, in their order.
TURN_TERMS = (
    "constant",
    "gap",  # mean of the logarithms of seconds until such turns were back
    "gap_spread",  # and their standard deviation
    "tokens",  # logarithm of the thousands of tokens kept
    "recompute",  # logarithm of the seconds that computing them takes
    "free",  # share of the replica's blocks that nobody holds or keeps
    "waiting",  # logarithm of the requests in its queue
    "host",  # share of its first tier that is filled
    "writing",  # logarithm of the seconds until its tiers have what they are sent
)
NUM_TURN_TERMS = len(TURN_TERMS)
#: Raised whenever a term changes.
TURN_SCHEMA_VERSION = 1
#: What the terms are made of beside the gaps: fields of `Turn`, in the order of a row of facts.
TURN_FACTS = ("kept_tokens", "recompute_s", "free_share", "num_waiting", "host_share", "writing_s")
KEPT_TOKENS, RECOMPUTE_S, FREE_SHARE, NUM_WAITING, HOST_SHARE, WRITING_S = range(len(TURN_FACTS))

#: Before so many gaps were seen, a turn is taken to be back after these seconds.
LEAST_GAPS, FIRST_GUESS_S = 8, 10.0
#: Shorter gaps count as this, for logarithms.
_SHORTEST_GAP_S = 1e-3
#: Logarithms of seconds for which a turn is kept stay between these.
_LEAST_LOG_S, _MOST_LOG_S = -7.0, 9.0


class TurnWeights(NamedTuple):
    """What a search has found.

    Attributes:
        keep: Weights of `TURN_TERMS` for the answer `KEEP`, `float64[NUM_TURN_TERMS]`.
        offload: The same for `OFFLOAD`, which cannot be given where there are no tiers.
        drop: The same for `DROP`.
        seconds: For the logarithm of the seconds that `KEEP` keeps.
    """

    keep: FloatArray
    offload: FloatArray
    drop: FloatArray
    seconds: FloatArray


@kernel
def gap_logs(gaps_s: FloatArray) -> tuple[float, float]:
    """Return mean and standard deviation of the logarithms of gaps, seconds, `float64[n]`."""
    count = gaps_s.shape[0]
    if count < LEAST_GAPS:
        return math.log(FIRST_GUESS_S), 0.0
    mean = 0.0
    for i in range(count):
        mean += math.log(max(gaps_s[i], _SHORTEST_GAP_S))
    mean /= count
    squares = 0.0
    for i in range(count):
        squares += (math.log(max(gaps_s[i], _SHORTEST_GAP_S)) - mean) ** 2
    return mean, math.sqrt(squares / count)


@kernel
def write_terms(facts: FloatArray, gaps_s: FloatArray, terms: FloatArray) -> None:
    """Write the terms of a turn.

    Args:
        facts: `TURN_FACTS`, `float64[len(TURN_FACTS)]`.
        gaps_s: Seconds until such turns were back, `float64[n]`.
        terms: Is given `TURN_TERMS`, `float64[NUM_TURN_TERMS]`.
    """
    terms[0] = 1.0
    terms[1], terms[2] = gap_logs(gaps_s)
    terms[3] = math.log(1.0 + facts[KEPT_TOKENS] / 1000.0)
    terms[4] = math.log(max(facts[RECOMPUTE_S], 1e-3))
    terms[5] = facts[FREE_SHARE]
    terms[6] = math.log(1.0 + facts[NUM_WAITING])
    terms[7] = facts[HOST_SHARE]
    terms[8] = math.log(1.0 + facts[WRITING_S])


@kernel
def answer_by_scores(weights: FloatArray, terms: FloatArray, tiered: bool) -> tuple[int, float]:
    """Return the answer with the highest score, and the seconds that `KEEP` keeps.

    Args:
        weights: `TurnWeights`, `float64[4, NUM_TURN_TERMS]`.
        terms: Of the turn, `float64[NUM_TURN_TERMS]`.
        tiered: Whether `OFFLOAD` can be given.
    """
    best, most, log_s = LEAVE, 0.0, 0.0
    for i, answer in enumerate((KEEP, OFFLOAD, DROP)):
        score = 0.0
        for k in range(terms.shape[0]):
            score += weights[i, k] * terms[k]
        if score > most and (answer != OFFLOAD or tiered):
            best, most = answer, score
    if best != KEEP:
        return best, 0.0
    for k in range(terms.shape[0]):
        log_s += weights[3, k] * terms[k]
    return KEEP, math.exp(min(max(log_s, _LEAST_LOG_S), _MOST_LOG_S))


def turn_terms(turn: Turn) -> FloatArray:
    """Return the terms of a turn, `float64[NUM_TURN_TERMS]`."""
    facts, terms = (
        np.array([getattr(turn, name) for name in TURN_FACTS], np.float64),
        np.empty(NUM_TURN_TERMS),
    )
    write_terms(facts, turn.gaps_s, terms)
    return terms


def scored_turns(weights: TurnWeights, name: str) -> RetentionRule:
    """Return the rule that goes by weights."""
    stacked = np.stack(weights).astype(np.float64)

    def retain(turn: Turn) -> tuple[int, float]:
        answer, keep_s = answer_by_scores(stacked, turn_terms(turn), turn.tiered)
        return answer, keep_s

    return RetentionRule(name, "predictive", retain, learned=True, weights=stacked)
