"""Observations to check an exported policy with, and to state what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
import torch

import servegym
from servegym.agents.network import DispatchNetwork
from servegym.scenario import Scenario
from servegym.typing import Float32Array


def sample_observations(
    network: DispatchNetwork,
    scenario: Scenario | str,
    *,
    load: float | tuple[float, float] = 1.0,
    num: int = 4096,
    seed: int = 0,
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Collect observations where the policy goes: its own actions, one in ten at random.

    Args:
        network: The policy.
        scenario: What is played: a scenario, its name or path.
        load: Factor on the rate, or a range.
        num: How many, at least.
        seed: Of episodes and actions.

    Returns:
        `replicas float32[n, R, F]`, `request float32[n, G]`, `mask float32[n, A]`.
    """
    assert servegym.__version__  # importing servegym registers the environment
    features = "extended" if network.config.extended else "contract"
    env = gymnasium.make_vec(
        "servegym/Dispatch-v1", num_envs=16, scenario=scenario, load=load, features=features
    )
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    rows: list[dict[str, np.ndarray]] = []
    while len(rows) * 16 < num:
        rows.append(observation)
        mask = observation["action_mask"]
        with torch.inference_mode():
            logits = network(
                torch.from_numpy(observation["replicas"]),
                torch.from_numpy(observation["request"]),
                torch.from_numpy(mask).float(),
            )
        drawn = (rng.random(mask.shape) * mask).argmax(-1)
        action = np.where(rng.random(len(mask)) < 0.1, drawn, logits.numpy().argmax(-1))
        observation, *_ = env.step(action)
    env.close()
    replicas, request, mask = (
        np.concatenate([row[key] for row in rows]) for key in ("replicas", "request", "action_mask")
    )
    some = mask.any(-1) & (request[:, 0] > 0)
    return replicas[some], request[some], mask[some].astype(np.float32)


def together(
    samples: Sequence[tuple[Float32Array, Float32Array, Float32Array]],
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Join observations of several scenarios, as if all fleets were as large as the largest.

    Args:
        samples: Of each, as `sample_observations` returns them, with the same actions besides the
            replicas.
    """
    if len(samples) == 1:
        return samples[0]
    width = max(replicas.shape[1] for replicas, _, _ in samples)
    made = []
    for replicas, request, mask in samples:
        own = replicas.shape[1]
        more = ((0, 0), (0, width - own))
        allowed = np.pad(mask[:, :own], more)
        made.append(
            (
                np.pad(replicas, (*more, (0, 0))),
                request,
                np.concatenate([allowed, mask[:, own:]], axis=1),
            )
        )
    replicas, request, mask = (np.concatenate(parts) for parts in zip(*made, strict=True))
    return replicas, request, mask
