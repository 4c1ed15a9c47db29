"""Shortest remaining first: admits the fewest predicted tokens left, preempts the most."""

from __future__ import annotations

from servegym.policy.ordering import OrderingFeature, OrderingRule
from servegym.typing import FloatArray

_REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    return features[:, _REMAINING].copy()


def srpt() -> OrderingRule:
    """Shortest remaining first: admits the fewest predicted tokens left, preempts the most."""
    return OrderingRule("srpt", "predictive", order, reference="Schrage 1968")
