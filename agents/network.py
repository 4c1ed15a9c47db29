"""A permutation-equivariant actor-critic that starts out as a heuristic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from servegym.agents.features import base_cost, replica_inputs
from servegym.agents.network_config import NetworkConfig
from servegym.policy.contract import Group, observed_groups
from servegym.policy.numpy_network import LEAST_COST, NetworkShape, family_of, num_inputs

#: Added to the logits of forbidden actions (Huang and Ontañón 2022).
MASKED = -1e8


class Prepared(NamedTuple):
    """What the network makes of an observation before any weight is used."""

    inputs: Tensor  # float32[batch, R, N], see `numpy_network.num_inputs`
    present: Tensor  # float32[batch, R], 1 where there is a replica
    prior: Tensor  # float32[batch, R], the heuristic's logits
    mask: Tensor  # float32[batch, R + num_extra], 1 where allowed


class _Encoder(nn.Module):
    """Encode each replica, and all of them together, whatever their number and order."""

    def __init__(self, inputs: int, hidden: int, context: str) -> None:
        super().__init__()
        self.own = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.attention = context == "attention"
        self.query = nn.Linear(hidden, hidden) if self.attention else nn.Identity()
        self.mix = nn.Linear((2 if self.attention else 1) * hidden, hidden)
        self.around = nn.Linear(2 * hidden, hidden)

    def forward(self, inputs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        weight = present.unsqueeze(-1)
        x = self.own(inputs) * weight
        mean = x.sum(-2) / weight.sum(-2).clamp(min=1.0)
        seen = self.around(torch.cat((mean, x.amax(-2)), -1))
        if self.attention:
            scores = self.query(x) @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
            scores = scores + MASKED * (1.0 - present).unsqueeze(-2)
            x = torch.cat((x, torch.softmax(scores, -1) @ x), -1)
        return torch.relu(self.mix(x) + seen.unsqueeze(-2)), seen


class DispatchNetwork(nn.Module):
    """Scores for every action, and the value of the state.

    Logits are `-eta * (cost - least cost) + f`, where `f` is zero at the start: the untrained
    policy is the heuristic, action for action. Costs are seconds, or the logarithms of them.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        inputs = num_inputs(extended=config.extended, arrivals=config.arrivals)
        self.actor = _Encoder(inputs, config.hidden, config.context)
        self.critic = nn.Sequential(
            nn.Linear(inputs, config.hidden), nn.ReLU(), nn.Linear(config.hidden, config.hidden)
        )
        self.score = nn.Linear(config.hidden, 1)
        self.extra = nn.Linear(config.hidden, max(1, config.num_extra))
        self.value = nn.Sequential(
            nn.Linear(2 * config.hidden, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, 2.0**0.5)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.extra.weight)
        nn.init.constant_(self.extra.bias, -10.0)  # a heuristic neither holds nor rejects

    @property
    def shape(self) -> NetworkShape:
        """What its weights alone do not say."""
        c = self.config
        family = family_of(extended=c.extended, arrivals=c.arrivals)
        return NetworkShape(
            family, c.context, c.base, c.base_params, c.eta, c.num_extra, c.relative
        )

    @property
    def needs(self) -> Group:
        """Feature groups it reads."""
        return observed_groups(extended=self.config.extended)

    def prepare(self, replicas: Tensor, request: Tensor, mask: Tensor) -> Prepared:
        """Turn raw observations into inputs; done once, however often they are learned from.

        Args:
            replicas: Raw, `float32[batch, R, F]`.
            request: Raw, `float32[batch, G]`.
            mask: 1 where allowed, `float32[batch, R + num_extra]`.
        """
        num = replicas.shape[-2]
        cost = base_cost(self.config.base, replicas, request, self.config.base_params)
        if self.config.relative:
            cost = cost.clamp(min=LEAST_COST).log()
        least = (cost - MASKED * (1.0 - mask[..., :num])).amin(-1, keepdim=True)
        return Prepared(
            replica_inputs(
                replicas,
                request,
                extended=self.config.extended,
                arrivals=self.config.arrivals,
            ),
            (replicas[..., 0] > 0).to(replicas.dtype),
            -self.config.eta * (cost - least),
            mask,
        )

    def logits(self, prepared: Prepared) -> Tensor:
        """Score all actions, `float32[batch, R + num_extra]`, forbidden ones at about -1e8."""
        x, seen = self.actor(prepared.inputs, prepared.present)
        scores = prepared.prior + self.score(x).squeeze(-1)
        if self.config.num_extra:
            scores = torch.cat((scores, self.extra(torch.relu(seen))), -1)
        return scores * prepared.mask + MASKED * (1.0 - prepared.mask)

    def values(self, prepared: Prepared) -> Tensor:
        """Estimate the (scaled) return, `float32[batch]`."""
        weight = prepared.present.unsqueeze(-1)
        x = torch.relu(self.critic(prepared.inputs)) * weight
        mean = x.sum(-2) / weight.sum(-2).clamp(min=1.0)
        return self.value(torch.cat((mean, x.amax(-2)), -1)).squeeze(-1)

    def forward(self, replicas: Tensor, request: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of raw observations; what is exported."""
        return self.logits(self.prepare(replicas, request, mask))
