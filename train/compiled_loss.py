"""The loss of PPO with its gradient written out, for networks with the mean as context.

Two thirds of the time of PyTorch's own backward pass go into copies, masks and reductions of arrays
that are a megabyte each. Here matrix products are PyTorch's, and all between two of them is one
pass of compiled code. `train.ppo_loss.AutogradLoss` says what is computed; a test holds both equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.agents.network_config import NetworkConfig
from servegym.policy.contract import observed
from servegym.train.loss_kernels import add_around, gate, policy_loss, pool, score_back, unpool
from servegym.train.ppo_loss import LossParts, LossWeights
from servegym.typing import Float32Array

_NUM_PARTS = len(LossParts._fields)


class _Room:
    """Working memory for minibatches of one size."""

    def __init__(self, size: int, width: int, num_actions: int, hidden: int) -> None:
        def rows() -> Tensor:
            return torch.empty(size * width, hidden)

        self.first, self.second, self.d_first, self.d_second = rows(), rows(), rows(), rows()
        self.mixed = rows()
        self.pooled = torch.empty(size, 2 * hidden)
        self.ties = torch.empty(size, hidden)
        self.d_seen = torch.empty(size, hidden)
        self.scores = torch.empty(size, num_actions)
        self.d_scores = torch.empty(size, num_actions)
        self.by_replica = size, width, hidden

    def cube(self, rows: Tensor) -> Float32Array:
        """See rows by decision and replica, `float32[batch, R, H]`."""
        array: Float32Array = rows.view(self.by_replica).numpy()
        return array


class CompiledLoss:
    """The loss of a network that `runs` here.

    Args:
        network: What learns.
    """

    def __init__(self, network: DispatchNetwork) -> None:
        self._network = network
        self._parameters = dict(network.named_parameters())
        self._weights = {name: value.detach() for name, value in self._parameters.items()}
        self._rooms: dict[tuple[int, int, int], _Room] = {}
        self._parts = np.zeros(_NUM_PARTS)

    @staticmethod
    def runs(network: DispatchNetwork) -> bool:
        """Whether it has the gradients of such a network, where that is."""
        on_cpu = next(network.parameters()).device.type == "cpu"
        return on_cpu and network.config.context == "mean"

    @torch.no_grad()
    def backward(
        self, prepared: Prepared, batch: Mapping[str, Tensor], weights: LossWeights
    ) -> LossParts:
        """Replace the gradients; see `train.ppo_loss.Loss.backward`."""
        for parameter in self._parameters.values():
            parameter.grad = None
        inputs = prepared.inputs.flatten(0, 1)
        size, width = prepared.present.shape
        key = size, width, prepared.mask.shape[1]
        if key not in self._rooms:
            self._rooms[key] = _Room(*key, self._network.config.hidden)
        room = self._rooms[key]
        self._parts[0] = 0.0
        if weights.value:
            self._value(room, inputs, prepared, batch["target"], weights)
        self._policy(room, inputs, prepared, batch, weights)
        return LossParts(*self._parts.tolist())

    def _layer(self, name: str, x: Tensor, out: Tensor | None = None) -> Tensor:
        w = self._weights
        return torch.addmm(w[f"{name}.bias"], x, w[f"{name}.weight"].t(), out=out)

    def _learnt(self, name: str, d_out: Tensor, x: Tensor, d_bias: Tensor | None = None) -> None:
        """Keep the gradients of a layer: of its output `d_out`, of its input `x`."""
        p = self._parameters
        p[f"{name}.weight"].grad = d_out.t() @ x
        p[f"{name}.bias"].grad = d_out.sum(0) if d_bias is None else d_bias

    def _encode(
        self, room: _Room, inputs: Tensor, prepared: Prepared, names: tuple[str, str]
    ) -> None:
        """Run two layers over all replicas and pool what they give."""
        self._layer(names[0], inputs, room.first).clamp_(min=0.0)
        self._layer(names[1], room.first, room.second).clamp_(min=0.0)
        pool(
            room.cube(room.second),
            prepared.present.numpy(),
            room.pooled.numpy(),
            room.ties.numpy(),
        )

    def _encode_back(
        self,
        room: _Room,
        inputs: Tensor,
        prepared: Prepared,
        names: tuple[str, str],
        d_pooled: Tensor,
    ) -> None:
        """Keep the gradients of those two layers; `d_second` has what has come by other ways."""
        hidden = room.ties.shape[1]
        d_bias = torch.empty(hidden)
        unpool(
            room.cube(room.d_second),
            room.cube(room.second),
            prepared.present.numpy(),
            room.pooled.numpy(),
            room.ties.numpy(),
            d_pooled.numpy(),
            d_bias.numpy(),
        )
        self._learnt(names[1], room.d_second, room.first, d_bias)
        torch.mm(room.d_second, self._weights[f"{names[1]}.weight"], out=room.d_first)
        d_bias = torch.empty(hidden)
        gate(room.d_first.numpy(), room.first.numpy(), d_bias.numpy())
        self._learnt(names[0], room.d_first, inputs, d_bias)

    def _value(
        self,
        room: _Room,
        inputs: Tensor,
        prepared: Prepared,
        target: Tensor,
        weights: LossWeights,
    ) -> None:
        """Gradients of the critic."""
        names = ("critic.0", "critic.2")
        self._encode(room, inputs, prepared, names)
        hidden = self._layer("value.0", room.pooled).clamp_(min=0.0)
        error = self._layer("value.2", hidden).squeeze(-1) - target
        self._parts[0] = 0.5 * float(error.square().mean())
        d_value = (weights.value / len(error)) * error.unsqueeze(-1)
        self._learnt("value.2", d_value, hidden)
        d_hidden = d_value @ self._weights["value.2.weight"]
        d_hidden *= hidden > 0.0
        self._learnt("value.0", d_hidden, room.pooled)
        room.d_second.zero_()
        d_pooled = d_hidden @ self._weights["value.0.weight"]
        self._encode_back(room, inputs, prepared, names, d_pooled)

    def _policy(
        self,
        room: _Room,
        inputs: Tensor,
        prepared: Prepared,
        batch: Mapping[str, Tensor],
        weights: LossWeights,
    ) -> None:
        """Gradients of the actor, unless the critic learns alone."""
        names, w = ("actor.own.0", "actor.own.2"), self._weights
        width = prepared.present.shape[1]
        has_extra = self._network.config.num_extra > 0
        self._encode(room, inputs, prepared, names)
        seen = self._layer("actor.around", room.pooled)
        torch.mm(room.second, w["actor.mix.weight"].t(), out=room.mixed)
        add_around(room.cube(room.mixed), w["actor.mix.bias"].numpy(), seen.numpy())
        score = w["score.weight"][0]
        own = torch.mv(room.mixed, score).add_(w["score.bias"]).view(-1, width)
        torch.add(prepared.prior, own, out=room.scores[:, :width])
        active = seen.clamp(min=0.0)
        if has_extra:
            room.scores[:, width:] = self._layer("extra", active)
        policy_loss(
            room.scores.numpy(),
            prepared.mask.numpy(),
            batch["action"].numpy(),
            batch["log_prob"].numpy(),
            batch["advantage"].numpy(),
            weights.clip,
            weights.entropy,
            room.d_scores.numpy(),
            self._parts,
        )
        if weights.warm:
            return
        d_score = torch.empty_like(w["score.weight"])
        score_back(
            room.d_scores.numpy(),
            score.numpy(),
            room.cube(room.mixed),
            room.d_seen.numpy(),
            d_score[0].numpy(),
        )
        self._parameters["score.weight"].grad = d_score
        self._parameters["score.bias"].grad = room.d_scores[:, :width].sum().view(1)
        self._learnt("actor.mix", room.mixed, room.second, room.d_seen.sum(0))
        torch.mm(room.mixed, w["actor.mix.weight"], out=room.d_second)
        d_seen = room.d_seen
        if has_extra:
            d_extra = room.d_scores[:, width:]
            self._learnt("extra", d_extra, active)
            d_seen = d_seen + (d_extra @ w["extra.weight"]) * (seen > 0.0)
        self._learnt("actor.around", d_seen, room.pooled)
        d_pooled = d_seen @ w["actor.around.weight"]
        self._encode_back(room, inputs, prepared, names, d_pooled)


def rehearse() -> None:
    """Compile."""
    network = DispatchNetwork(NetworkConfig(hidden=4))
    width, seen = 2, observed(extended=False)
    with torch.no_grad():
        prepared = network.prepare(
            torch.zeros(1, width, seen.replicas), torch.zeros(1, seen.request), torch.ones(1, width)
        )
    batch = {name: torch.zeros(1) for name in ("log_prob", "advantage", "target")}
    batch["action"] = torch.zeros(1, dtype=torch.int64)
    weights = LossWeights(clip=0.2, value=0.5, entropy=0.0, warm=False)
    CompiledLoss(network).backward(prepared, batch, weights)
