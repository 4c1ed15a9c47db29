"""Observations to check an exported policy with."""

from __future__ import annotations

import gymnasium
import numpy as np

import servegym
from servegym.typing import Float32Array


def sample_observations(
    scenario: str, *, load: float | tuple[float, float] = 1.0, num: int = 2048, seed: int = 0
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Collect observations under random allowed actions.

    Args:
        scenario: Name or path.
        load: Factor on the rate, or a range.
        num: How many, at least.
        seed: Of episodes and actions.

    Returns:
        `replicas float32[n, R, F]`, `request float32[n, G]`, `mask float32[n, A]`.
    """
    assert servegym.__version__  # importing servegym registers the environment
    env = gymnasium.make_vec("servegym/Dispatch-v0", num_envs=16, scenario=scenario, load=load)
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    rows: list[dict[str, np.ndarray]] = []
    while len(rows) * 16 < num:
        rows.append(observation)
        draw = rng.random(observation["action_mask"].shape) * observation["action_mask"]
        observation, *_ = env.step(draw.argmax(-1))
    env.close()
    replicas, request, mask = (
        np.concatenate([row[key] for row in rows]) for key in ("replicas", "request", "action_mask")
    )
    some = mask.any(-1) & (request[:, 0] > 0)
    return replicas[some], request[some], mask[some].astype(np.float32)
