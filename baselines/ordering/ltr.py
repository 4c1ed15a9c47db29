"""Learning to rank: shortest predicted rest first, with a guard against starvation."""

from __future__ import annotations

import numpy as np

from servegym.policy.contract import NO_BOUND
from servegym.policy.ordering import IS_RUNNING, PREDICTED_REMAINING_TOKENS, OrderingRule
from servegym.typing import FloatArray

# what is kept of a request
_BOOSTED, _IDLE_STEPS, _STEPS_LEFT = range(3)


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    starvation, period = params
    running = features[:, IS_RUNNING] > 0.0
    boosted = memory[:, _BOOSTED] > 0.0
    memory[:, _IDLE_STEPS] = np.where(running, 0.0, memory[:, _IDLE_STEPS] + 1.0)
    memory[:, _STEPS_LEFT] -= running & boosted
    boosted &= memory[:, _STEPS_LEFT] > 0.0
    starved = memory[:, _IDLE_STEPS] >= starvation
    memory[starved, _IDLE_STEPS] = 0.0
    memory[starved, _STEPS_LEFT] = period
    boosted |= starved
    memory[:, _BOOSTED] = boosted
    return features[:, PREDICTED_REMAINING_TOKENS] - NO_BOUND * boosted


def ltr(starvation: float = 500.0, period: float = 50.0) -> OrderingRule:
    """Learning to rank: shortest predicted rest first, with a guard against starvation.

    Args:
        starvation: Steps without service after which a request goes before all others.
        period: Steps it then runs before it is like the others again.
    """
    return OrderingRule(
        "ltr",
        "predictive",
        order,
        params=np.array([starvation, period]),
        param_names=("starvation", "period"),
        memory_size=3,
        reference="vLLM-LTR (Fu et al. 2024)",
    )
