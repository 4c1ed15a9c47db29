"""Shortest remaining first: admits the fewest predicted tokens left, preempts the most."""

from __future__ import annotations

from servegym.policy.ordering import PREDICTED_REMAINING_TOKENS, OrderingRule
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    return features[:, PREDICTED_REMAINING_TOKENS].copy()


def srpt() -> OrderingRule:
    """Shortest remaining first: admits the fewest predicted tokens left, preempts the most."""
    return OrderingRule("srpt", "predictive", order, reference="Schrage 1968")
