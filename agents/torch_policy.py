"""A network as a `Policy`, before it is exported."""

from __future__ import annotations

import numpy as np

from servegym.agents.acting import Acting
from servegym.agents.network import DispatchNetwork
from servegym.policy.layout import agent_actions, agent_arrays
from servegym.policy.policy import Information, Observations
from servegym.typing import IntArray


class TorchPolicy:
    """The most probable action of a network."""

    information: Information = "predictive"

    def __init__(self, network: DispatchNetwork, name: str = "ppo") -> None:
        self.network = network.eval()
        self._acting = Acting(network)
        self.needs = network.needs
        self.name = name

    def reset(self, num_envs: int, seed: int) -> None:
        """Do nothing: the network has no memory."""

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        config = self.network.config
        actions = agent_actions(observations.mask, config.num_extra, holds=config.holds)
        arrays = agent_arrays(observations, actions, extended=config.extended)
        replicas, request, mask = arrays
        logits = self._acting.logits(self._acting.prepared(replicas, request, mask.astype(np.int8)))
        return actions[logits.argmax(-1).numpy()]
