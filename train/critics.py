"""Critics of agents: one of the whole fleet, or one for each class of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Critic(nn.Module):
    """A perceptron over logarithms of raw features, each about its mean in units of its spread.

    Args:
        inputs: Features.
        hidden: Units of each of two layers.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 1),
        )
        for module in self.net:
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, 2.0**0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]

    def fit(self, features: Tensor) -> None:
        """Take the distribution of features from samples, `float32[n, inputs]`."""
        logs = _logs(features)
        self.mean.copy_(logs.mean(0))
        spread = logs.std(0)
        self.spread.copy_(torch.where(spread > 1e-4, spread, torch.ones_like(spread)))

    def forward(self, features: Tensor) -> Tensor:
        """Estimate returns from raw features, `float32[n, inputs]`; `float32[n]`."""
        x = ((_logs(features) - self.mean) / self.spread).clamp(-5.0, 5.0)
        values: Tensor = self.net(x).squeeze(-1)
        return values


def _logs(features: Tensor) -> Tensor:
    return features.abs().log1p().copysign(features)


def seen_by_scheduler(rows: Tensor, engine: Tensor) -> Tensor:
    """Sum up what a scheduler sees, for its critic, whatever the number of its requests.

    Args:
        rows: Of requests, `float32[n, M, F]`; those of nobody are 0.
        engine: The rest, `float32[n, K]`.

    Returns:
        Mean and greatest of each feature over the requests that there are, and the rest,
        `float32[n, 2 * F + K]`.
    """
    there = (rows != 0.0).any(-1, keepdim=True).to(rows.dtype)
    mean = rows.sum(1) / there.sum(1).clamp(min=1.0)
    return torch.cat((mean, rows.amax(1), engine), -1)
