"""Random order, drawn once for each request: what an order is worth that knows nothing."""

from __future__ import annotations

import numpy as np

from servegym.policy.ordering import OrderingRule
from servegym.typing import FloatArray


def random_order(seed: float = 0.0) -> OrderingRule:
    """Random order, drawn once for each request: what an order is worth that knows nothing.

    Args:
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(int(seed))

    def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
        # 0 stands for "not drawn yet"
        new = memory[:, 0] == 0.0
        memory[new, 0] = 1.0 - rng.random(int(new.sum()))
        return memory[:, 0].copy()

    return OrderingRule(
        "random",
        "blind",
        order,
        params=np.array([seed]),
        param_names=("seed",),
        memory_size=1,
    )
