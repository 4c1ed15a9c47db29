"""A permutation-equivariant actor-critic that starts out as a heuristic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from servegym.agents.features import base_cost, hold_gain, replica_inputs
from servegym.agents.network_config import NetworkConfig
from servegym.errors import ConfigError
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
    hold: Tensor  # float32[batch, R], beyond the best's logit if it is that; [batch, 0]: no holds


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
    policy is the heuristic, action for action. Costs are seconds, or the logarithms of them. Where
    the heuristic holds, the logit of a hold is that of the best replica plus what the heuristic
    and another `f` of that replica say.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.holds and config.num_extra == 0:
            raise ConfigError(
                f"a network that starts as {config.base} must have the action to hold, got "
                "num_extra 0: give 1, or 2 if it may reject, too"
            )
        self.config = config
        inputs = num_inputs(extended=config.extended, arrivals=config.arrivals, holds=config.holds)
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
        if config.holds:  # but for those that do
            self.hold = nn.Linear(config.hidden, 1)
            nn.init.zeros_(self.hold.weight)
            nn.init.zeros_(self.hold.bias)

    @property
    def shape(self) -> NetworkShape:
        """What its weights alone do not say."""
        c = self.config
        family = family_of(extended=c.extended, arrivals=c.arrivals, holds=c.holds)
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
        hold = cost[..., :0]
        if self.config.holds:
            gain = hold_gain(replicas, request, self.config.base_params)
            hold = (self.config.eta * gain).clamp(min=MASKED)
        return Prepared(
            replica_inputs(
                replicas,
                request,
                extended=self.config.extended,
                arrivals=self.config.arrivals,
                holds=self.config.holds,
            ),
            (replicas[..., 0] > 0).to(replicas.dtype),
            -self.config.eta * (cost - least),
            mask,
            hold,
        )

    def logits(self, prepared: Prepared) -> Tensor:
        """Score all actions, `float32[batch, R + num_extra]`, forbidden ones at about -1e8."""
        x, seen = self.actor(prepared.inputs, prepared.present)
        scores = prepared.prior + self.score(x).squeeze(-1)
        if self.config.num_extra:
            scores = torch.cat((scores, self.extra(torch.relu(seen))), -1)
        scores = scores * prepared.mask + MASKED * (1.0 - prepared.mask)
        if not self.config.holds:
            return scores
        num = prepared.present.shape[-1]
        best, place = scores[..., :num].max(-1, keepdim=True)
        held = best + (prepared.hold + self.hold(x).squeeze(-1)).gather(-1, place)
        allowed = prepared.mask[..., num : num + 1]
        held = held * allowed + MASKED * (1.0 - allowed)
        return torch.cat((scores[..., :num], held, scores[..., num + 1 :]), -1)

    def values(self, prepared: Prepared) -> Tensor:
        """Estimate the (scaled) return, `float32[batch]`."""
        weight = prepared.present.unsqueeze(-1)
        x = torch.relu(self.critic(prepared.inputs)) * weight
        mean = x.sum(-2) / weight.sum(-2).clamp(min=1.0)
        return self.value(torch.cat((mean, x.amax(-2)), -1)).squeeze(-1)

    def forward(self, replicas: Tensor, request: Tensor, mask: Tensor) -> Tensor:
        """Return the logits of raw observations; what is exported."""
        return self.logits(self.prepare(replicas, request, mask))
