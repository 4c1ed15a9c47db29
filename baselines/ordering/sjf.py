"""Shortest job first: fewest predicted output tokens; nobody is preempted for being long."""

from __future__ import annotations

import numpy as np

from servegym.policy.ordering import OrderingFeature, OrderingRule
from servegym.typing import FloatArray

_RUNNING = int(OrderingFeature["IS_RUNNING"])
_GENERATED = int(OrderingFeature["GENERATED_TOKENS"])
_REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])
_WAITED = int(OrderingFeature["WAITED_S"])


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    size = features[:, _GENERATED] + features[:, _REMAINING]
    return np.where(features[:, _RUNNING] > 0.0, -features[:, _WAITED], size)


def sjf() -> OrderingRule:
    """Shortest job first: fewest predicted output tokens; nobody is preempted for being long."""
    return OrderingRule("sjf", "predictive", order, reference="SSJF (Qiu et al. 2024)")
