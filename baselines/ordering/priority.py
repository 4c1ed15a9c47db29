"""The client's priority: the lowest number first, then the earliest arrival, as in vLLM."""

from __future__ import annotations

from servegym.policy.ordering import OrderingFeature, OrderingRule
from servegym.typing import FloatArray

_PRIORITY = int(OrderingFeature["CLIENT_PRIORITY"])


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    return features[:, _PRIORITY].copy()


def priority() -> OrderingRule:
    """The client's priority: the lowest number first, then the earliest arrival, as in vLLM."""
    return OrderingRule("priority", "blind", order, reference="vLLM priority")
