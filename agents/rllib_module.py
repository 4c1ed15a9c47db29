"""RLlib modules with action masks: the dispatcher's network, and a perceptron for any agent."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from servegym.agents.network import MASKED, DispatchNetwork, Prepared
from servegym.agents.network_config import NetworkConfig


@cache
def dispatch_module() -> type[Any]:
    """Return the class of the module; RLlib is imported only for who asks.

    It is `DispatchNetwork` over raw observations of `servegym/Dispatch-v1`, in attribute `network`.
    `model_config["network"]` is a `NetworkConfig` as a dictionary. Forbidden actions have logits of
    about -1e8, so none is ever drawn. PPO, APPO and IMPALA know all that they need of it.
    """
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis import TARGET_NETWORK_ACTION_DIST_INPUTS, TargetNetworkAPI
    from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
    from ray.rllib.core.rl_module.torch import TorchRLModule

    class DispatchModule(TorchRLModule, ValueFunctionAPI, TargetNetworkAPI):  # type: ignore[misc]
        """Scores actions and estimates returns."""

        network: DispatchNetwork

        def setup(self) -> None:
            """Make the network."""
            self.network = DispatchNetwork(NetworkConfig(**self.model_config["network"]))

        def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
            logits = self.network.logits(self._prepared(batch))
            return {Columns.ACTION_DIST_INPUTS: logits}

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

    return DispatchModule


@cache
def masked_module() -> type[Any]:
    """Return the class of a perceptron with action masks; RLlib is imported only for who asks.

    Of observations `{"observation": float32[n], "action_mask": int8[actions]}`, as the agents of
    `servegym.envs.rllib` have them. `model_config["hidden"]` are its units a layer, 64 unless
    given. The critic has layers of its own. Forbidden actions are never drawn.
    """
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
    from ray.rllib.core.rl_module.torch import TorchRLModule

    class MaskedModule(TorchRLModule, ValueFunctionAPI):  # type: ignore[misc]
        """Scores actions and estimates returns."""

        def setup(self) -> None:
            """Make both perceptrons."""
            inputs = self.observation_space["observation"].shape[0]
            hidden = int(self.model_config.get("hidden", 64))
            self.actor = _perceptron(inputs, hidden, int(self.action_space.n))
            self.critic = _perceptron(inputs, hidden, 1)

        def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
            seen = batch[Columns.OBS]
            mask = seen["action_mask"].float()
            logits = self.actor(seen["observation"]) * mask + MASKED * (1.0 - mask)
            return {Columns.ACTION_DIST_INPUTS: logits}

        def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
            """Estimate the return from each observation, `float32[batch]`."""
            values: Tensor = self.critic(batch[Columns.OBS]["observation"]).squeeze(-1)
            return values

    return MaskedModule


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden),
        nn.Tanh(),
        nn.Linear(hidden, outputs),
    )
