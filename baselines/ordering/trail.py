"""SRPT that preempts a request only while it is young: an old one holds much KV and ends soon."""

from __future__ import annotations

import numpy as np

from servegym.policy.contract import NO_BOUND
from servegym.policy.ordering import (
    GENERATED_TOKENS,
    IS_RUNNING,
    PREDICTED_REMAINING_TOKENS,
    OrderingRule,
)
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    remaining, generated = features[:, PREDICTED_REMAINING_TOKENS], features[:, GENERATED_TOKENS]
    old = generated >= params[0] * (generated + remaining)
    return np.where(old & (features[:, IS_RUNNING] > 0.0), remaining - NO_BOUND, remaining)


def trail(young: float = 0.8) -> OrderingRule:
    """SRPT that preempts a request only while it is young: an old one holds much KV and ends soon.

    Args:
        young: Share of its predicted output up to which a request counts as young.
    """
    return OrderingRule(
        "trail",
        "predictive",
        order,
        params=np.array([young]),
        param_names=("young",),
        reference="TRAIL (Shahout et al. 2024), with one prediction a request",
    )
