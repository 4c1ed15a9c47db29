"""The `Policy` protocol: heuristics, planners, oracles and learned policies alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from servegym.policy.contract import Group
from servegym.typing import BoolArray, FloatArray, IntArray, UInt64Array

Information = Literal["blind", "metric", "predictive", "oracle"]


class Observations(NamedTuple):
    """What a batch of pending decisions looks like, in the units of `policy.contract`.

    Attributes:
        replicas: `float64[batch, NUM_REPLICA_FEATURES, R]`; columns of absent replicas are 0.
        request: `float64[batch, NUM_REQUEST_FEATURES]`.
        mask: Allowed actions, `bool[batch, R + 2]`: replicas, then hold, then reject. An index
            into it is an action, wherever decisions are taken and carried out.
    """

    replicas: FloatArray
    request: FloatArray
    mask: BoolArray


@runtime_checkable
class Policy(Protocol):
    """Chooses a replica for each pending request, or what else is allowed."""

    @property
    def name(self) -> str:
        """Name of the policy in tables."""
        ...

    @property
    def information(self) -> Information:
        """What it may know; printed with every result."""
        ...

    @property
    def needs(self) -> Group:
        """Feature groups it reads; others may be 0."""
        ...

    def reset(self, num_envs: int, seed: int) -> None:
        """Forget everything and prepare for batches of `num_envs`."""
        ...

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide for all environments that ask.

        Args:
            observations: One row per pending decision.
            env_ids: Which environment each row belongs to, for policies with memory,
                `int64[batch]`.

        Returns:
            Indices into the masks, `int64[batch]`.
        """
        ...


@runtime_checkable
class Scoring(Protocol):
    """A policy that can say what it gives each action, of which it takes the best."""

    def scores(self, observations: Observations) -> FloatArray:
        """Score all actions of a batch of one.

        Args:
            observations: One row.

        Returns:
            `float64[R + 2]`, by the mask's indices; -inf for those not allowed. The policy was
            trained to take each with the probability of their softmax.
        """
        ...


#: A rule in compiled form: `decide(replicas, request, mask, params, memory, rng) -> action`, with
#: `float64[F, R]`, `float64[G]`, `bool[R + 2]`, `float64[p]`, `float64[m]`, `uint64[1]`.
Decide = Callable[[FloatArray, FloatArray, BoolArray, FloatArray, FloatArray, UInt64Array], int]


@dataclass
class Heuristic:
    """A rule given as a compiled function; runs inside the simulator's loop or from Python.

    Attributes:
        name: Name in tables.
        information: Information class.
        needs: Feature groups it reads.
        decide: The compiled rule (`numba.njit` with the signature `policy.rule.SIGNATURE`).
        params: Its tunable numbers, `float64[p]`.
        param_names: Their names.
        memory_size: How many float64 it keeps from decision to decision (zeroed at reset).
        reference: Where the rule comes from.
        learned: Whether a search has found it.
        memory: What it keeps, `float64[num_envs, memory_size]`.
        rng: Its random streams, `uint64[num_envs, 1]`.
    """

    name: str
    information: Information
    needs: Group
    decide: Decide
    params: FloatArray = field(default_factory=lambda: np.zeros(0))
    param_names: tuple[str, ...] = ()
    memory_size: int = 0
    reference: str = ""
    learned: bool = False
    memory: FloatArray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    rng: UInt64Array = field(default_factory=lambda: np.zeros((0, 1), np.uint64), repr=False)

    def reset(self, num_envs: int, seed: int) -> None:
        """Zero the memory and seed one random stream per environment."""
        self.memory = np.zeros((num_envs, self.memory_size))
        streams = np.random.SeedSequence(seed).generate_state(num_envs, np.uint64)
        self.rng = streams.reshape(num_envs, 1).astype(np.uint64)

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Apply the rule row by row."""
        actions = np.empty(len(env_ids), np.int64)
        for row, env in enumerate(env_ids.tolist()):
            actions[row] = self.decide(
                observations.replicas[row],
                observations.request[row],
                observations.mask[row],
                self.params,
                self.memory[env],
                self.rng[env],
            )
        return actions
