"""A network as a `Policy`, before it is exported."""

from __future__ import annotations

import numpy as np
import torch

from servegym.agents.network import DispatchNetwork
from servegym.cluster.state import HOLD, REJECT
from servegym.policy.contract import NUM_OBSERVED_FEATURES
from servegym.policy.policy import Information, Observations
from servegym.typing import Float32Array, IntArray


def network_arrays(
    observations: Observations, num_extra: int
) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Bring observations into the layout of the environment: replicas, request, mask."""
    replicas = observations.replicas[:, :NUM_OBSERVED_FEATURES].transpose(0, 2, 1)
    width = replicas.shape[1]
    keep = [*range(width), width, width + 1][: width + num_extra]
    if num_extra == 1 and not observations.mask[:, width].any():
        keep[-1] = width + 1  # the scenario rejects but does not hold
    return (
        np.ascontiguousarray(replicas, np.float32),
        observations.request.astype(np.float32),
        observations.mask[:, keep].astype(np.float32),
    )


def to_core(actions: IntArray, width: int, observations: Observations) -> IntArray:
    """Translate indices of the action space to replicas, `HOLD` and `REJECT`."""
    can_hold = bool(observations.mask[:, width].any())
    extra = np.where((actions == width) & can_hold, HOLD, REJECT)
    return np.where(actions < width, actions, extra).astype(np.int64)


def from_core(chosen: IntArray, width: int, observations: Observations) -> IntArray:
    """Translate replicas, `HOLD` and `REJECT` to indices of the action space."""
    can_hold = bool(observations.mask[:, width].any())
    reject = width + 1 if can_hold else width
    return np.where(chosen >= 0, chosen, np.where(chosen == HOLD, width, reject)).astype(np.int64)


class TorchPolicy:
    """The most probable action of a network."""

    information: Information = "predictive"
    needs = DispatchNetwork.needs

    def __init__(self, network: DispatchNetwork, name: str = "ppo") -> None:
        self.network = network.eval()
        self.name = name

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the network has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        arrays = network_arrays(observations, self.network.config.num_extra)
        with torch.inference_mode():
            logits = self.network(*(torch.from_numpy(a) for a in arrays))
        return to_core(logits.argmax(-1).numpy(), arrays[0].shape[1], observations)
