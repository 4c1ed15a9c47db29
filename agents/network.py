"""A permutation-equivariant actor-critic that starts out as a heuristic."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from servegym.agents.features import NUM_INPUTS, base_cost, replica_inputs

#: Added to the logits of forbidden actions (Huang and Ontañón 2022).
MASKED = -1e8


class NetworkConfig(BaseModel):
    """Shape of the network and the heuristic it corrects."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden: int = Field(48, ge=4)
    context: str = Field("mean", pattern="^(mean|attention)$")
    base: str = Field("prefix-load", pattern="^(prefix-load|speed-family|least-outstanding)$")
    base_params: tuple[float, ...] = (0.05, 1.0)
    eta: float = Field(20.0, gt=0)
    num_extra: int = Field(0, ge=0, le=2)  # hold, reject


class _Encoder(nn.Module):
    """Encode each replica, and all of them together, whatever their number and order."""

    def __init__(self, hidden: int, context: str) -> None:
        super().__init__()
        self.own = nn.Sequential(
            nn.Linear(NUM_INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.attention = context == "attention"
        self.query = nn.Linear(hidden, hidden) if self.attention else nn.Identity()
        self.mix = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.Tanh())

    def forward(self, inputs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        weight = present.unsqueeze(-1)
        x = self.own(inputs) * weight
        mean = x.sum(-2) / weight.sum(-2).clamp(min=1.0)
        if self.attention:
            scores = self.query(x) @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
            scores = scores + MASKED * (1.0 - present).unsqueeze(-2)
            seen = torch.softmax(scores, -1) @ x
        else:
            seen = mean.unsqueeze(-2).expand_as(x)
        top = (x + MASKED * (1.0 - weight)).amax(-2)
        both = torch.cat((x, seen, top.unsqueeze(-2).expand_as(x)), -1)
        return self.mix(both), mean


class DispatchNetwork(nn.Module):
    """Scores for every action, and the value of the state.

    Logits are `-eta * (cost - least cost) + f`, where `f` is zero at the start: the untrained
    policy is the heuristic, action for action.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.actor = _Encoder(config.hidden, config.context)
        self.critic = _Encoder(config.hidden, config.context)
        self.score = nn.Linear(config.hidden, 1)
        self.extra = nn.Linear(config.hidden, max(1, config.num_extra))
        self.value = nn.Linear(2 * config.hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, 2.0**0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.extra.weight)
        nn.init.constant_(self.extra.bias, -10.0)  # a heuristic neither holds nor rejects
        nn.init.orthogonal_(self.value.weight, 1.0)

    def logits(self, replicas: Tensor, request: Tensor, mask: Tensor) -> Tensor:
        """Score all actions.

        Args:
            replicas: Raw, `float32[batch, R, F]`.
            request: Raw, `float32[batch, G]`.
            mask: 1 where allowed, `float32[batch, R + num_extra]`.

        Returns:
            `float32[batch, R + num_extra]`, forbidden ones at about -1e8.
        """
        num = replicas.shape[-2]
        present = (replicas[..., 0] > 0).to(replicas.dtype)
        x, mean = self.actor(replica_inputs(replicas, request), present)
        allowed = mask[..., :num]
        cost = base_cost(self.config.base, replicas, request, self.config.base_params)
        least = (cost - MASKED * (1.0 - allowed)).amin(-1, keepdim=True)
        scores = -self.config.eta * (cost - least) + self.score(x).squeeze(-1)
        if self.config.num_extra:
            scores = torch.cat((scores, self.extra(mean)), -1)
        return scores * mask + MASKED * (1.0 - mask)

    def values(self, replicas: Tensor, request: Tensor) -> Tensor:
        """Estimate the (scaled) return, `float32[batch]`."""
        present = (replicas[..., 0] > 0).to(replicas.dtype)
        x, mean = self.critic(replica_inputs(replicas, request), present)
        pooled = (x * present.unsqueeze(-1)).sum(-2) / present.sum(-1, keepdim=True).clamp(min=1.0)
        return self.value(torch.cat((pooled, mean), -1)).squeeze(-1)

    def forward(self, replicas: Tensor, request: Tensor, mask: Tensor) -> Tensor:
        """Return the logits; what is exported."""
        return self.logits(replicas, request, mask)
