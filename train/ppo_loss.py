"""The loss of PPO and its gradient: by PyTorch for any network, in compiled code for most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from servegym.agents.network import DispatchNetwork, Prepared
from servegym.train.returns import chosen


class LossWeights(NamedTuple):
    """What the loss is made of, `value * critic's - gain - entropy * entropy`.

    Attributes:
        clip: PPO's ratio clip.
        value: Weight of the critic's loss; 0: the critic is not asked, and has no gradient.
        entropy: Weight of the entropy.
        warm: Whether the critic learns alone, so that gain and entropy do not count.
    """

    clip: float
    value: float
    entropy: float
    warm: bool


class LossParts(NamedTuple):
    """Means over a minibatch."""

    value_loss: float
    gain: float
    entropy: float
    kl: float  # of the policy that has acted from the present one, estimated
    clipped: float  # share of decisions whose ratio is beyond the clip


class Loss(Protocol):
    """Computes the loss, and leaves its gradient in the parameters of a network."""

    def backward(
        self, prepared: Prepared, batch: Mapping[str, Tensor], weights: LossWeights
    ) -> LossParts:
        """Replace the gradients of the network's parameters.

        Args:
            prepared: What was seen at the decisions.
            batch: Of each decision its `action` (`int64[batch]`), the `log_prob` with which it
                was taken, its `advantage` and the critic's `target` (`float32[batch]`).
            weights: What counts.
        """
        ...


class AutogradLoss:
    """The loss of any network, on any device.

    Args:
        network: What learns.
    """

    def __init__(self, network: DispatchNetwork) -> None:
        self._network = network

    def backward(
        self, prepared: Prepared, batch: Mapping[str, Tensor], weights: LossWeights
    ) -> LossParts:
        """Replace the gradients; see `Loss.backward`."""
        log_probs = self._network.logits(prepared).log_softmax(-1)
        log_ratio = chosen(log_probs, batch["action"]) - batch["log_prob"]
        ratio, a = log_ratio.exp(), batch["advantage"]
        clipped = ratio.clamp(1 - weights.clip, 1 + weights.clip)
        gain = torch.minimum(ratio * a, clipped * a).mean()
        value_loss = torch.zeros(())
        if weights.value:
            value_loss = 0.5 * (self._network.values(prepared) - batch["target"]).square().mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        loss = weights.value * value_loss
        if not weights.warm:
            loss = loss - gain - weights.entropy * entropy
        self._network.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            return LossParts(
                float(value_loss),
                float(gain),
                float(entropy),
                float((ratio - 1 - log_ratio).mean()),
                float(((ratio - 1).abs() > weights.clip).float().mean()),
            )
