"""Equally good replicas in turn: rules take the first of those that cost the same."""

from __future__ import annotations

import random

import numpy as np

from servegym.policy.policy import Observations, Policy
from servegym.typing import IntArray


class TieBreaker:
    """Shows a policy the replicas there are, in an order of which no replica has the best place.

    Rules take the first of equally good replicas. In a fixed order that is always the same one, and
    several routers side by side send it what is due to all. Here the longest without a request
    comes first, give or take a round drawn by a seed, so that one router goes round and several do
    not march in step.

    Args:
        seed: Of what is drawn; `None`: another for every router.
    """

    def __init__(self, seed: int | None) -> None:
        self._random = random.Random(seed)
        self._turn, self._step = 0.0, 1.0
        self._ranks = np.zeros(0)  # of free slots: infinite
        self._slots: IntArray = np.zeros(0, np.int64)
        self._replicas = np.empty((0, 0))
        self._order: IntArray = np.arange(2)

    def add(self, slot: int) -> None:
        """A replica has taken a slot."""
        if slot >= len(self._ranks):
            more = slot + 1 - len(self._ranks)
            self._ranks = np.append(self._ranks, np.full(more, np.inf))
        self._ranks[slot] = self._turn + self._random.random()
        self._set_out()

    def remove(self, slot: int) -> None:
        """A replica has left its slot."""
        self._ranks[slot] = np.inf
        self._set_out()

    def _set_out(self) -> None:
        self._slots = np.flatnonzero(np.isfinite(self._ranks))
        width, num = len(self._ranks), len(self._slots)
        self._order = np.append(self._slots, (width, width + 1))  # hold and reject come last
        self._step = 1.0 / max(1, num)

    def show(self, observations: Observations, *, in_turn: bool) -> tuple[Observations, IntArray]:
        """Return observations of the replicas there are, in another order, and the order.

        Args:
            observations: A batch of one, with a column for each of W slots.
            in_turn: Change the order; else it is that of the slots.

        Returns:
            Arrays that the next call overwrites, and the slot at each place, `int64[R + 2]`; the
            last two are W and W + 1, to hold and to reject.
        """
        replicas, request, mask = observations
        order = self._order
        if in_turn:
            order[:-2] = self._ranks.argsort()[: len(self._slots)]
        else:
            order[:-2] = self._slots
        shape = (replicas.shape[1], len(self._slots))
        if self._replicas.shape != shape:
            self._replicas = np.empty(shape)
        replicas[0].take(order[:-2], axis=1, out=self._replicas, mode="clip")
        return Observations(self._replicas[None], request, mask.take(order, axis=1)), order

    def chose(self, slot: int) -> None:
        """A replica has got a request."""
        self._turn += self._step
        self._ranks[slot] = 1.0 + self._turn + self._random.random()


def counts_replicas(policy: Policy) -> bool:
    """Whether a policy remembers replicas by their place, as round robin does."""
    return getattr(policy, "memory_size", 0) > 0
