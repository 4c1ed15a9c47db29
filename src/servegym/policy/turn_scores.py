"""Scores of what may become of the KV of an ended turn: what a search gives weights to.

Each answer has a linear score in some terms, and the highest is given; that of `LEAVE` is 0. How
long `KEEP` keeps is the exponential of another one. With some weights this is one of the rules
`lru`, `ttl`, `lognormal` or `offload-within`, choice for choice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

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

#: Before so many gaps were seen, a turn is taken to be back after these seconds.
LEAST_GAPS, FIRST_GUESS_S = 8, 10.0
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


def gap_logs(gaps_s: FloatArray) -> tuple[float, float]:
    """Return mean and standard deviation of the logarithms of gaps, seconds."""
    if len(gaps_s) < LEAST_GAPS:
        return math.log(FIRST_GUESS_S), 0.0
    logs = np.log(np.maximum(gaps_s, 1e-3))
    return float(logs.mean()), float(logs.std())


def turn_terms(turn: Turn) -> FloatArray:
    """Return the terms of a turn, `float64[NUM_TURN_TERMS]`."""
    gap, spread = gap_logs(turn.gaps_s)
    return np.array(
        [
            1.0,
            gap,
            spread,
            math.log(1.0 + turn.kept_tokens / 1000.0),
            math.log(max(turn.recompute_s, 1e-3)),
            turn.free_share,
            math.log(1.0 + turn.num_waiting),
            turn.host_share,
            math.log(1.0 + turn.writing_s),
        ]
    )


def scored_turns(weights: TurnWeights, name: str) -> RetentionRule:
    """Return the rule that goes by weights."""
    answers, scores = (KEEP, OFFLOAD, DROP), np.array([weights.keep, weights.offload, weights.drop])

    def retain(turn: Turn) -> tuple[int, float]:
        terms = turn_terms(turn)
        best, most = LEAVE, 0.0
        for answer, score in zip(answers, (scores @ terms).tolist(), strict=True):
            if score > most and (answer != OFFLOAD or turn.tiered):
                best, most = answer, score
        if best != KEEP:
            return best, 0.0
        return KEEP, math.exp(min(max(float(weights.seconds @ terms), _LEAST_LOG_S), _MOST_LOG_S))

    return RetentionRule(name, "predictive", retain, learned=True)
