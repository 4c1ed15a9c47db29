"""Dispatchers as flat weights that a search can move: a rule's numbers, and a score beside it.

They are networks of the family that all dispatchers are, of one hidden layer: what is searched here
is exported, and runs in a router, like what is learned by gradients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from servegym.agents.features import base_cost, replica_inputs
from servegym.agents.network import DispatchNetwork
from servegym.agents.network_config import NetworkConfig
from servegym.errors import ConfigError
from servegym.policy.costs import HELD_BASES, INFERRED_BASES
from servegym.policy.layout import agent_actions, agent_arrays
from servegym.policy.numpy_network import num_inputs
from servegym.policy.perceptron_rule import SEARCHED, Base
from servegym.policy.play_fleet import Dispatchers
from servegym.policy.play_perceptron import Perceptrons
from servegym.policy.policy import Heuristic, Observations, Policy
from servegym.policy.replica_inputs import (
    KV_USAGE_INPUT,
    LENGTH_INPUTS,
    NUM_EXTENDED_INPUTS,
    NUM_INPUTS,
    OUTSTANDING_INPUT,
    OUTSTANDING_SHARE_INPUT,
)
from servegym.typing import Float32Array, FloatArray, IntArray

#: Numbers of rule `added-delay`: the weight of its cost, then its own two; as logarithms.
_NUM_RULE = 3
#: Weights of a hidden unit: of its inputs, its bias, and to the score.
UNIT = NUM_INPUTS + 2
#: An input that differs by less from replica to replica is given no weight.
_LEAST_SPREAD = 1e-3
#: In place of no weight, where only a weight's logarithm is searched.
_NEXT_TO_NOTHING = 0.05
#: In its place where choices must not change: lost when it is added to a score.
_NOTHING = 1e-30
#: What a linear score of holds may go by: how full a replica is, what waits there, what the request
#: will take of it, who is on hold, and for how long. Hidden units may go by all inputs.
_HOLD_INPUTS = (1, 2, 9, 11, 12, 13, 23, 28, 31, 40, 41)
#: Rules that the space contains, choice for choice.
CONTAINED_DISPATCHES = ("added-delay", "least-outstanding", "min-kv")
#: What `min-kv` adds for each outstanding request to the share of KV blocks held.
_KV_TIE = 1e-6
#: Units of a network at least.
_LEAST_HIDDEN = 4


class Observer:
    """A dispatcher that keeps what it sees.

    Args:
        inner: Who decides.
        num_extra: Actions besides the replicas.
        extended: Whether what a router infers is kept, too.
    """

    def __init__(self, inner: Policy, num_extra: int, *, extended: bool = False) -> None:
        self._inner, self._num_extra, self._extended = inner, num_extra, extended
        self.name, self.information, self.needs = inner.name, inner.information, inner.needs
        self._kept: list[tuple[Float32Array, Float32Array, Float32Array]] = []

    def reset(self, num_envs: int, seed: int) -> None:
        """Reset who decides."""
        self._inner.reset(num_envs, seed)

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        actions = agent_actions(observations.mask, self._num_extra)
        arrays = agent_arrays(observations, actions, extended=self._extended)
        self._kept.append(arrays)
        return self._inner.act(observations, env_ids)

    def samples(self) -> tuple[Float32Array, Float32Array, Float32Array]:
        """Return what was kept: `replicas`, `request` and `mask`, see `policy.layout`."""
        replicas, request, mask = map(np.concatenate, zip(*self._kept, strict=True))
        return replicas, request, mask


class DispatchSpace:
    """Dispatchers as flat weights: the rule's, a linear score, hidden units if there are any.

    Args:
        replicas: Of observations, `float32[n, R, F]`; inputs are normalised by them.
        request: Of the same, `float32[n, G]`.
        num_extra: Actions besides the replicas, which are never taken while a replica is allowed.
        base: The rule.
        params: Its numbers, for those that are not searched.
        extended: Whether the score has inputs of what a router infers, too.
        holds_only: Whether there is a linear score of holds alone, none of replicas.
    """

    def __init__(
        self,
        replicas: Float32Array,
        request: Float32Array,
        num_extra: int,
        base: Base = "added-delay",
        params: FloatArray | None = None,
        *,
        extended: bool = False,
        holds_only: bool = False,
    ) -> None:
        self._num_extra, self._base = num_extra, base
        self._params = np.ones(2) if params is None else params
        self._searched = np.array(SEARCHED[base])
        self._holds = base in HELD_BASES
        sees_all, extended = extended, extended or self._holds
        self._num_inputs = num_inputs(extended=extended, holds=self._holds)
        rows = torch.from_numpy(replicas), torch.from_numpy(request)
        x = replica_inputs(*rows, extended=extended, holds=self._holds).numpy()
        there = replicas[..., 0] > 0
        own = x[there].astype(np.float64)
        apart = np.abs(x - x[:, :1])[there & there[:, :1]]
        spread = own.std(0)
        self._varies = spread > _LEAST_SPREAD
        if self._holds and not sees_all:
            unseen = [k for k in range(NUM_INPUTS, NUM_EXTENDED_INPUTS) if k not in LENGTH_INPUTS]
            self._varies[unseen] = False
        self._mean = own.mean(0)
        self._scale = np.where(self._varies, spread, 1.0)
        # what all replicas have in common changes no linear choice
        self._linear = np.flatnonzero(self._varies & (apart.max(0, initial=0.0) > _LEAST_SPREAD))
        if holds_only:
            self._linear = self._linear[:0]
        self._held = np.array([k for k in _HOLD_INPUTS if self._holds and self._varies[k]], int)

    def guesses(self) -> list[FloatArray]:
        """Return weights from which a search may begin, those of rules or near to them.

        `added-delay` itself, least completion time (the same without delays of others), fewest
        outstanding requests, least KV in use.
        """
        return [
            self._guess(),
            self._guess(prefill=_NEXT_TO_NOTHING, decode=_NEXT_TO_NOTHING),
            self._guess({OUTSTANDING_INPUT: -1.0}, eta=_NEXT_TO_NOTHING),
            self._guess({KV_USAGE_INPUT: -1.0}, eta=_NEXT_TO_NOTHING),
        ]

    def rule_itself(self, params: FloatArray, eta: float) -> FloatArray:
        """Return the weights of the rule with such numbers; those that are searched above 0.

        Args:
            params: The numbers.
            eta: Weight of its cost beside the linear score, per second.
        """
        own = np.log([eta, *params[self._searched]])
        return np.concatenate([own, np.zeros(len(self._linear) + len(self._held))])

    def like(self, rule: Heuristic, max_num_seqs: int) -> FloatArray:
        """Return the weights that choose as a rule of `CONTAINED_DISPATCHES`.

        Args:
            rule: The rule.
            max_num_seqs: Of all engines.

        Raises:
            ConfigError: If what it goes by never differs from replica to replica.
        """
        name = rule.name.partition(":")[0]
        if name == "added-delay":
            prefill, decode = np.maximum(rule.params, _NOTHING).tolist()
            return self._guess(prefill=prefill, decode=decode)
        wanted = {OUTSTANDING_INPUT: -1.0}
        if name == "min-kv":
            # both as inputs are normalised, the tie-break by the share of slots
            tie = _KV_TIE * max_num_seqs * self._scale[OUTSTANDING_SHARE_INPUT]
            tie /= self._scale[KV_USAGE_INPUT]
            wanted = {KV_USAGE_INPUT: -1.0, OUTSTANDING_SHARE_INPUT: -tie}
        if not set(wanted) <= set(self._linear.tolist()):
            raise ConfigError(
                f"{name} cannot be the start where replicas never differ in what it goes by: "
                "raise load"
            )
        return self._guess(wanted, eta=_NOTHING)

    def _guess(
        self,
        scores: dict[int, float] | None = None,
        *,
        eta: float = 1.0,
        prefill: float = 1.0,
        decode: float = 1.0,
    ) -> FloatArray:
        """Return the weights of a rule and of some inputs."""
        linear = np.zeros(len(self._linear))
        for k, weight in (scores or {}).items():
            linear[self._linear == k] = weight
        return np.concatenate([np.log([eta, prefill, decode]), linear])

    def with_units(self, theta: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
        """Put hidden units beside a linear score; their outputs are 0: choices stay as they are."""
        inputs = self._num_inputs
        free = np.zeros((count, inputs + 2 + self._holds))
        free[:, : inputs + 1] = rng.normal(0.0, 0.3, (count, inputs + 1))
        return np.concatenate([theta, free.ravel()])

    def dispatchers(self, thetas: FloatArray) -> Dispatchers:
        """Build dispatchers from flat weights, `float64[C, size]`.

        A linear score passes two hidden units, one for each sign; and so does one of holds.
        """
        count = len(thetas)
        ends = np.cumsum([1 + len(self._searched), len(self._linear), len(self._held)])
        found, linear, held, free = np.split(thetas, ends, axis=1)
        rule = np.tile(np.concatenate([[1.0], self._params]), (count, 1))
        rule[:, 0], rule[:, 1 + self._searched] = np.exp(found[:, 0]), np.exp(found[:, 1:])
        inputs, heads = self._num_inputs, 1 + self._holds
        extra, passed = free.shape[1] // (inputs + 1 + heads), 2 * heads
        hidden = np.zeros((count, inputs, passed + extra))
        bias = np.zeros((count, passed + extra))
        out = np.zeros((count, passed + extra, heads))
        hidden[:, self._linear, 0], hidden[:, self._linear, 1] = linear, -linear
        out[:, 0, 0], out[:, 1, 0] = 1.0, -1.0
        if self._holds:
            hidden[:, self._held, 2], hidden[:, self._held, 3] = held, -held
            out[:, 2, 1], out[:, 3, 1] = 1.0, -1.0
        parts = free.reshape(count, extra, inputs + 1 + heads)
        hidden[:, :, passed:] = (parts[:, :, :inputs] * self._varies).transpose(0, 2, 1)
        bias[:, passed:] = parts[:, :, inputs]
        out[:, passed:] = parts[:, :, inputs + 1 :]
        return Dispatchers(rule, Perceptrons(self._mean, self._scale, hidden, bias, out))

    def prepared(self, replicas: Tensor, request: Tensor) -> tuple[Tensor, Tensor]:
        """Turn observations into what `scores` takes; done once, however often they are scored.

        Args:
            replicas: Raw, `float32[batch, R, F]`.
            request: Raw, `float32[batch, G]`.

        Returns:
            Normalised inputs, `float32[batch, R, NUM_INPUTS]`, and of the rule's cost, seconds,
            what it is alone, and what each of its parameters adds, `float32[batch, R, 3]`.
        """
        x = replica_inputs(replicas, request)
        mean, scale = (torch.from_numpy(a).to(x.dtype) for a in (self._mean, self._scale))
        alone, prefill, decode = (
            base_cost(self._base, replicas, request, params)
            for params in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
        )
        return (x - mean) / scale, torch.stack((alone, prefill - alone, decode - alone), -1)

    def scores(self, theta: Tensor, inputs: Tensor, costs: Tensor) -> Tensor:
        """Score replicas as `dispatchers` does, with gradients.

        Args:
            theta: Flat weights, `float32[size]`.
            inputs: As from `prepared`.
            costs: The same.

        Returns:
            `float32[batch, R]`; a request goes where it is greatest.
        """
        own = len(self._linear)
        rule, linear, free = theta.split([_NUM_RULE, own, len(theta) - _NUM_RULE - own])
        weight, prefill, decode = rule.exp()
        cost = costs[..., 0] + prefill * costs[..., 1] + decode * costs[..., 2]
        parts = free.view(-1, UNIT)
        hidden = parts[:, :NUM_INPUTS] * torch.from_numpy(self._varies)
        units = (inputs @ hidden.T + parts[:, NUM_INPUTS]).relu()
        return inputs[..., self._linear] @ linear + units @ parts[:, NUM_INPUTS + 1] - weight * cost

    def network(self, theta: FloatArray) -> DispatchNetwork:
        """Return the network that chooses alike."""
        rule, nets = self.dispatchers(theta[None])
        inputs = nets.hidden[0] / nets.scale[:, None]
        bias = nets.hidden_bias[0] - nets.mean @ inputs
        used = len(bias)
        eta, *params = rule[0].tolist()
        config = NetworkConfig(
            hidden=max(_LEAST_HIDDEN, used),
            base=self._base,
            base_params=tuple(params),
            eta=eta,
            num_extra=self._num_extra,
            extended=self._num_inputs > NUM_INPUTS or self._base in INFERRED_BASES,
        )
        network = DispatchNetwork(config)
        actor = network.actor
        first, second = actor.own[0], actor.own[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        with torch.no_grad():
            nn.init.zeros_(first.weight)
            first.weight[:used, : self._num_inputs] = torch.from_numpy(inputs.T)
            first.bias[:used] = torch.from_numpy(bias)
            # what is behind the hidden layer passes it on, whatever is around
            nn.init.eye_(second.weight)
            nn.init.eye_(actor.mix.weight)
            nn.init.zeros_(actor.around.weight)
            network.score.weight[0, :used] = torch.from_numpy(nets.out[0, :, 0])
            if self._holds:
                network.hold.weight[0, :used] = torch.from_numpy(nets.out[0, :, 1])
        return network
