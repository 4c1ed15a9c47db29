"""The dispatcher's network as an RLlib module, with action masks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.agents.network_config import NetworkConfig


class DispatchModule(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI):  # type: ignore[misc]
    """`DispatchNetwork` over raw observations of `servegym/Dispatch-v1`.

    `model_config["network"]` is a `NetworkConfig` as a dictionary. Forbidden actions have logits of
    about -1e8, so none is ever drawn. PPO, APPO and IMPALA know all that they need of it.
    """

    network: DispatchNetwork

    def setup(self) -> None:
        """Make the network."""
        self.network = DispatchNetwork(NetworkConfig(**self.model_config["network"]))

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.network.logits(self._prepared(batch))}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """Estimate the return from each observation, `float32[batch]`."""
        return self.network.values(self._prepared(batch))

    def make_target_networks(self) -> None:
        """Make the network that APPO compares with."""
        self.before = copy.deepcopy(self.network).requires_grad_(False)

    def get_target_network_pairs(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """Return what follows what."""
        return [(self.network, self.before)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Score actions by the network from before."""
        logits = self.before.logits(self._prepared(batch))
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: logits}

    def _prepared(self, batch: dict[str, Any]) -> Prepared:
        seen = batch[Columns.OBS]
        replicas, request = seen["replicas"].float(), seen["request"].float()
        return self.network.prepare(replicas, request, seen["action_mask"].float())
