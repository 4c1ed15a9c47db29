"""What a network does, without gradients: by compiled code where that runs it, else by PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.policy.compiled_network import CompiledNetwork, Described, Layers, runs
from servegym.typing import Float32Array, Int8Array

#: In the order of `Layers`.
_LAYERS = ("actor.own.0", "actor.own.2", "actor.mix", "actor.around", "score", "extra")


class Acting:
    """Scores of actions in observations; gives the network's own within float32 rounding.

    Args:
        network: Its weights are read at every call; they may change, but not move.
    """

    def __init__(self, network: DispatchNetwork) -> None:
        self._network = network
        self._device = next(network.parameters()).device
        self._compiled: CompiledNetwork | None = None
        if self._device.type == "cpu" and runs(network.shape):
            weights = [
                network.get_parameter(f"{layer}.{part}").detach().numpy()
                for layer in _LAYERS
                for part in ("weight", "bias")
            ]
            self._compiled = CompiledNetwork(network.shape, Layers(*weights))

    @torch.no_grad()
    def prepared(self, replicas: Float32Array, request: Float32Array, mask: Int8Array) -> Prepared:
        """Turn raw observations into inputs; see `DispatchNetwork.prepare`.

        Args:
            replicas: `float32[batch, R, F]`.
            request: `float32[batch, G]`.
            mask: 1 where allowed, `int8[batch, R + num_extra]`.
        """
        if self._compiled is not None:
            described = self._compiled.describe(replicas, request, mask)
            inputs, present, prior, allowed = (torch.from_numpy(array) for array in described)
            no_hold = torch.empty(len(request), 0)  # no rule that runs here holds
            return Prepared(inputs, present, prior, allowed, no_hold)
        return self._network.prepare(
            torch.from_numpy(replicas).to(self._device),
            torch.from_numpy(request).to(self._device),
            torch.from_numpy(mask).to(self._device, torch.float32),
        )

    @torch.no_grad()
    def logits(self, prepared: Prepared) -> Tensor:
        """Score all actions; see `DispatchNetwork.logits`."""
        if self._compiled is not None:
            described = Described(*(tensor.numpy() for tensor in prepared[:-1]))
            return torch.from_numpy(self._compiled.logits(described))
        return self._network.logits(prepared)
