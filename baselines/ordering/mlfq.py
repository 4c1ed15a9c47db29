"""Multi-level feedback queue with skip-join: little attained service first, no predictions."""

from __future__ import annotations

import numpy as np

from servegym.policy.ordering import (
    IDLE_S,
    IS_RUNNING,
    NO_LIMIT_S,
    STEP_S,
    WAITED_S,
    OrderingRule,
    prefill_left_s,
)
from servegym.typing import FloatArray

# what is kept of a request
_JOINED, _LEVEL, _USED_S = range(3)
#: Levels at most: beyond, a quantum is longer than any request.
_MAX_LEVEL = 30


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    quantum_s, growth, starvation_s = params
    new = memory[:, _JOINED] == 0.0
    if new.any():
        # the first token's time is known from the prompt: shorter quanta would only be used up
        needed = np.maximum(prefill_left_s(features[new]) / quantum_s, 1.0)
        memory[new, _LEVEL] = np.minimum(np.ceil(np.log(needed) / np.log(growth)), _MAX_LEVEL)
        memory[new, _JOINED] = 1.0
    running = features[:, IS_RUNNING] > 0.0
    memory[:, _USED_S] += np.where(running, features[:, STEP_S], 0.0)
    spent = memory[:, _USED_S] > quantum_s * growth ** memory[:, _LEVEL]
    memory[spent, _LEVEL] = np.minimum(memory[spent, _LEVEL] + 1.0, _MAX_LEVEL)
    starved = features[:, IDLE_S] >= starvation_s
    memory[starved, _LEVEL] = 0.0
    memory[spent | starved, _USED_S] = 0.0
    return memory[:, _LEVEL] * NO_LIMIT_S - features[:, WAITED_S]


def mlfq(quantum_s: float = 0.01, growth: float = 2.0, starvation_s: float = 3.0) -> OrderingRule:
    """Multi-level feedback queue with skip-join: little attained service first, no predictions.

    Args:
        quantum_s: Service a request gets on the first level before it goes down one.
        growth: Quantum of a level over the one above it.
        starvation_s: Time without service after which a request is back on the first level.
    """
    return OrderingRule(
        "mlfq",
        "blind",
        order,
        params=np.array([quantum_s, growth, starvation_s]),
        param_names=("quantum_s", "growth", "starvation_s"),
        memory_size=3,
        reference="FastServe (Wu et al. 2023); the defaults are vLLM-LTR's",
    )
