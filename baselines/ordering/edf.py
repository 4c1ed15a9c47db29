"""Earliest deadline first: the TTFT limit until the first token, then the E2E limit."""

from __future__ import annotations

import numpy as np

from servegym.policy.contract import NO_BOUND
from servegym.policy.ordering import (
    DEADLINE_SLACK_S,
    TTFT_SLACK_S,
    OrderingRule,
    prefill_left_s,
    remaining_s,
)
from servegym.typing import FloatArray


def slack_s(features: FloatArray) -> FloatArray:
    """Time each request can still lose before it misses a limit, in seconds, `float64[n]`."""
    first: FloatArray = features[:, TTFT_SLACK_S] - prefill_left_s(features)
    return np.minimum(first, features[:, DEADLINE_SLACK_S] - remaining_s(features))


def demote_hopeless(score: FloatArray, features: FloatArray) -> FloatArray:
    """Put requests that miss a limit whatever is done behind all others.

    Without it, one late request makes the next ones late (the domino of EDF under overload).
    """
    return np.where(slack_s(features) < 0.0, score + NO_BOUND, score)


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    left: FloatArray = np.minimum(features[:, TTFT_SLACK_S], features[:, DEADLINE_SLACK_S])
    return demote_hopeless(left, features) if params[0] > 0.0 else left


def edf(hopeless_last: float = 0.0) -> OrderingRule:
    """Earliest deadline first: the TTFT limit until the first token, then the E2E limit.

    Args:
        hopeless_last: 1 to put requests that cannot meet their limit any more behind all others;
            they are told by their predicted length.
    """
    return OrderingRule(
        "edf",
        "predictive" if hopeless_last else "blind",
        order,
        params=np.array([hopeless_last]),
        param_names=("hopeless_last",),
        reference="Liu and Layland 1973",
    )
