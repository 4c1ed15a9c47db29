"""Least KV still to be held over time first: tokens left, times the KV held meanwhile."""

from __future__ import annotations

import numpy as np

from servegym.policy.ordering import (
    GENERATED_TOKENS,
    IS_RUNNING,
    PREDICTED_REMAINING_TOKENS,
    PROMPT_TOKENS,
    OrderingRule,
)
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    remaining = features[:, PREDICTED_REMAINING_TOKENS]
    held = features[:, PROMPT_TOKENS] + features[:, GENERATED_TOKENS] + 0.5 * remaining
    power = np.where(features[:, IS_RUNNING] > 0.0, params[1], params[0])
    score: FloatArray = remaining * np.power(held, power)
    return score


def footprint(weight: float = 1.0, victim_weight: float = 1.0) -> OrderingRule:
    """Least KV still to be held over time first: tokens left, times the KV held meanwhile.

    Where KV is what is short, a request costs others the blocks it holds as long as it holds them.

    Args:
        weight: Exponent of the KV held, among the waiting; with both at 0 it is `srpt`.
        victim_weight: The same among the running. Whoever holds much frees much, but has much to
            compute again.
    """
    return OrderingRule(
        "footprint",
        "predictive",
        order,
        params=np.array([weight, victim_weight]),
        param_names=("weight", "victim_weight"),
        reference="weighted shortest processing time (Smith 1956) on KV-seconds",
    )
