"""The client's priority: the lowest number first, then the earliest arrival, as in vLLM."""

from __future__ import annotations

from servegym.policy.ordering import CLIENT_PRIORITY, OrderingRule
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    return features[:, CLIENT_PRIORITY].copy()


def priority() -> OrderingRule:
    """The client's priority: the lowest number first, then the earliest arrival, as in vLLM."""
    return OrderingRule("priority", "blind", order, reference="vLLM priority")
