"""Orders as flat weights that a search can move: a linear score, and hidden units beside it.

The linear part is a score in the logarithms of a request's features, some twenty numbers: it can be
any product of powers of them, of which shortest remaining first is one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from servegym.errors import ConfigError
from servegym.policy.learned_ordering import CLIP, OrderingWeights
from servegym.policy.ordering import (
    COMPUTED_TOKENS,
    GENERATED_TOKENS,
    NUM_ORDERING_FEATURES,
    NUM_RUNNING,
    PREDICTED_REMAINING_TOKENS,
    PROMPT_TOKENS,
    WAITED_S,
    OrderingPolicy,
    OrderingRule,
)
from servegym.policy.play_perceptron import Orders, Perceptrons
from servegym.typing import FloatArray

#: The request's own features; the engine's are the same in all rows and change no linear order.
_OWN = range(COMPUTED_TOKENS, NUM_RUNNING)
#: Rows that say how features are distributed.
_NUM_SAMPLES = 20_000
#: Weights of a hidden unit: of its inputs, its bias, and to both heads.
UNIT = NUM_ORDERING_FEATURES + 3
#: Rules that the space contains, where there are powers.
CONTAINED_ORDERS = ("fcfs", "footprint", "srpt")


class Sampler:
    """An order that keeps some of the rows it sees.

    Args:
        inner: Who orders.
        rng: Says which are kept.
    """

    memory_size = 0

    def __init__(self, inner: OrderingPolicy, rng: np.random.Generator) -> None:
        self._inner, self._rng = inner, rng
        self.name, self.information = inner.name, inner.information
        self._rows: list[FloatArray] = []

    def score(self, features: FloatArray, memory: FloatArray) -> FloatArray:
        """See `OrderingPolicy.score`."""
        self._rows.append(features[self._rng.random(len(features)) < 0.05])
        return self._inner.score(features, memory)

    def samples(self, where: str) -> FloatArray:
        """Return what was kept, shuffled, `float64[n, NUM_ORDERING_FEATURES]`.

        Args:
            where: What was played, for the message.

        Raises:
            ConfigError: If nobody was ever ordered.
        """
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, NUM_ORDERING_FEATURES))
        if not len(rows):
            raise ConfigError(f"nobody ever waits for another in {where}: raise load")
        return rows[self._rng.permutation(len(rows))[:_NUM_SAMPLES]]


class OrderSpace:
    """Perceptrons of two heads, the score of a waiting and of a running request, as flat weights.

    First the powers of both heads, where they have some, then their linear scores, then hidden
    units, if there are any.

    Args:
        samples: Rows of features, `float64[n, NUM_ORDERING_FEATURES]`; inputs are normalised by
            them.
        powers: Whether scores have `OrderingWeights.powers`, too.

    Attributes:
        linear: Which features the linear scores weigh.
    """

    def __init__(self, samples: FloatArray, *, powers: bool = False) -> None:
        self._num_powers = 4 if powers else 0
        logs = np.copysign(np.log1p(np.abs(samples)), samples)
        self._mean = logs.mean(0)
        spread = logs.std(0)
        # of a feature that never differs in training nothing is learned: it is given no weight
        self._varies = spread > 1e-6
        self.scale = np.where(self._varies, spread, 1.0)
        self.linear = [k for k in _OWN if self._varies[k]]

    def guess(self, *powers: dict[int, float]) -> FloatArray:
        """Return linear scores that add some features.

        Args:
            powers: Weights of normalised features, of a waiting request and of a running one; one
                alone is for both.
        """
        theta = np.zeros((2, len(self.linear)))
        for head in range(2):
            for feature, weight in powers[min(head, len(powers) - 1)].items():
                if feature in self.linear:
                    theta[head, self.linear.index(feature)] = weight
        return theta.ravel()

    def like(self, rule: OrderingRule) -> FloatArray:
        """Return the weights that order as a rule of `CONTAINED_ORDERS`, where there are powers."""
        theta, powers = np.zeros((2, len(self.linear))), np.zeros((2, 2))
        if rule.name.partition(":")[0] == "fcfs":
            if WAITED_S not in self.linear:
                raise ConfigError("fcfs cannot be the start where nobody ever waits: raise load")
            theta[:, self.linear.index(WAITED_S)] = -1.0
        else:
            powers[:, 0] = 1.0
            powers[:, 1] = rule.params if len(rule.params) else 0.0
        return np.concatenate([powers.ravel(), theta.ravel()])

    def with_units(self, theta: FloatArray, count: int, rng: np.random.Generator) -> FloatArray:
        """Put hidden units beside a linear score; their outputs are 0, so the order is the same."""
        free = np.zeros((count, UNIT))
        free[:, : NUM_ORDERING_FEATURES + 1] = rng.normal(
            0.0, 0.3, (count, NUM_ORDERING_FEATURES + 1)
        )
        return np.concatenate([theta, free.ravel()])

    def perceptrons(self, thetas: FloatArray) -> Perceptrons:
        """Build perceptrons from flat weights, `float64[C, size]`: linear part, hidden part.

        A linear score passes two hidden units, one for each sign.
        """
        count, own = len(thetas), len(self.linear)
        first = self._num_powers
        _, linear, free = np.split(thetas, [first, first + 2 * own], axis=1)
        extra = free.shape[1] // UNIT
        hidden = np.zeros((count, NUM_ORDERING_FEATURES, 4 + extra))
        bias = np.zeros((count, 4 + extra))
        out = np.zeros((count, 4 + extra, 2))
        for head in range(2):
            direction = linear[:, head * own : (head + 1) * own]
            hidden[:, self.linear, 2 * head] = direction
            hidden[:, self.linear, 2 * head + 1] = -direction
            out[:, 2 * head, head] = 1.0
            out[:, 2 * head + 1, head] = -1.0
        parts = free.reshape(count, extra, UNIT)
        inputs = parts[:, :, :NUM_ORDERING_FEATURES] * self._varies
        hidden[:, :, 4:] = inputs.transpose(0, 2, 1)
        bias[:, 4:] = parts[:, :, NUM_ORDERING_FEATURES]
        out[:, 4:] = parts[:, :, NUM_ORDERING_FEATURES + 1 :]
        return Perceptrons(self._mean, self.scale, hidden, bias, out)

    def orders(self, thetas: FloatArray) -> Orders:
        """Build orders from flat weights, `float64[C, size]`: perceptrons, and their powers."""
        orders = Orders.of(self.perceptrons(thetas))
        if self._num_powers:
            orders.powers[:] = thetas[:, : self._num_powers].reshape(-1, 2, 2)
        return orders

    def prepared(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Turn rows of features into what `scores` takes; done once, however often they are scored.

        Args:
            rows: As the contract has them, `float32[..., NUM_ORDERING_FEATURES]`; rows of 0 are of
                nobody.

        Returns:
            Normalised features, of the same shape, and the logarithms that powers are of, tokens
            left and KV held meanwhile, `float32[..., 2]`.
        """
        logs = rows.abs().log1p().copysign(rows)
        mean, scale = (torch.from_numpy(x).to(rows.dtype) for x in (self._mean, self.scale))
        left = rows[..., PREDICTED_REMAINING_TOKENS]
        held = rows[..., PROMPT_TOKENS] + rows[..., GENERATED_TOKENS] + 0.5 * left
        powers = torch.stack((left, held), -1).clamp(min=1.0).log()
        return ((logs - mean) / scale).clamp(-CLIP, CLIP), powers

    def scores(self, theta: Tensor, rows: Tensor, logs: Tensor | None = None) -> Tensor:
        """Score rows as `orders` does, with gradients.

        Args:
            theta: Flat weights, `float64[size]`.
            rows: Normalised features, `float64[..., NUM_ORDERING_FEATURES]`.
            logs: Where there are powers, the logarithms that they are of, `float64[..., 2]`.

        Returns:
            Of both heads, `float64[..., 2]`.
        """
        first, own = self._num_powers, 2 * len(self.linear)
        powers, linear, free = theta.split([first, own, len(theta) - first - own])
        parts = free.view(-1, UNIT)
        inputs = parts[:, :NUM_ORDERING_FEATURES] * torch.from_numpy(self._varies)
        units = (rows @ inputs.T + parts[:, NUM_ORDERING_FEATURES]).relu()
        scores = rows[..., self.linear] @ linear.view(2, -1).T
        scores = scores + units @ parts[:, NUM_ORDERING_FEATURES + 1 :]
        return scores if logs is None else scores + logs @ powers.view(2, 2).T

    def weights(self, theta: FloatArray) -> OrderingWeights:
        """Return an order as its file holds it."""
        powers, nets = self.orders(theta[None])
        return OrderingWeights(
            mean=nets.mean.astype(np.float32),
            scale=nets.scale.astype(np.float32),
            weights=(nets.hidden[0].astype(np.float32), nets.out[0].astype(np.float32)),
            biases=(nets.hidden_bias[0].astype(np.float32), np.zeros(2, np.float32)),
            powers=powers[0],
        )
