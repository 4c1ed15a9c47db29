"""Equally good replicas in turn: rules take the first of those that cost the same."""

from __future__ import annotations

import random

import numpy as np

from servegym.policy.policy import Observations, Policy
from servegym.typing import IntArray


class TieBreaker:
    """Shows a policy the replicas in an order of which no replica has the best place.

    Rules take the first of equally good replicas. In a fixed order that is always the same one, and
    several routers side by side send it what is due to all. Here the longest without a request
    comes first, give or take a round drawn by a seed, so that one router goes round and several do
    not march in step.

    Args:
        num_replicas: How many there are.
        seed: Of what is drawn; `None`: another for every router.
    """

    def __init__(self, num_replicas: int, seed: int | None) -> None:
        self._random = random.Random(seed)
        self._turn = 0.0
        self._step = 1.0 / num_replicas
        self._replicas = np.empty((0, 0))
        self._order = np.arange(num_replicas + 2)  # hold and reject keep their places
        self._ranks = np.array([self._random.random() for _ in range(num_replicas)])

    def show(self, observations: Observations) -> tuple[Observations, IntArray]:
        """Return observations with their replicas in another order, and the order.

        Args:
            observations: A batch of one.

        Returns:
            Arrays that the next call overwrites, and the action at each place, `int64[R + 2]`.
        """
        replicas, request, mask = observations
        order = self._order
        order[:-2] = self._ranks.argsort()
        if self._replicas.shape != replicas[0].shape:
            self._replicas = np.empty_like(replicas[0])
        replicas[0].take(order[:-2], axis=1, out=self._replicas, mode="clip")
        return Observations(self._replicas[None], request, mask.take(order, axis=1)), order

    def chose(self, replica: int) -> None:
        """A replica has got a request."""
        self._turn += self._step
        self._ranks[replica] = 1.0 + self._turn + self._random.random()


def counts_replicas(policy: Policy) -> bool:
    """Whether a policy remembers replicas by their place, as round robin does."""
    return getattr(policy, "memory_size", 0) > 0
