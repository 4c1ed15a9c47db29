"""First come, first served: the latest arrival is preempted first, as in vLLM."""

from __future__ import annotations

from servegym.policy.ordering import WAITED_S, OrderingRule
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    return -features[:, WAITED_S]


def fcfs() -> OrderingRule:
    """First come, first served: the latest arrival is preempted first, as in vLLM."""
    return OrderingRule("fcfs", "blind", order, reference="vLLM fcfs")
