"""Shortest job first: fewest predicted output tokens; nobody is preempted for being long."""

from __future__ import annotations

import numpy as np

from servegym.policy.ordering import (
    GENERATED_TOKENS,
    IS_RUNNING,
    PREDICTED_REMAINING_TOKENS,
    WAITED_S,
    OrderingRule,
)
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    size = features[:, GENERATED_TOKENS] + features[:, PREDICTED_REMAINING_TOKENS]
    return np.where(features[:, IS_RUNNING] > 0.0, -features[:, WAITED_S], size)


def sjf() -> OrderingRule:
    """Shortest job first: fewest predicted output tokens; nobody is preempted for being long."""
    return OrderingRule("sjf", "predictive", order, reference="SSJF (Qiu et al. 2024)")
