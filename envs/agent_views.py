"""The agents of fleets: what they are called, may do, see and earn."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces

from servegym.cluster.jit import fixed
from servegym.envs.cluster_batch import ClusterBatch
from servegym.envs.cluster_kernels import KIND_PREEMPT, KIND_RETAIN
from servegym.envs.fleet_kernels import FleetViews, gather, look_at_fleets
from servegym.envs.migration_kernels import MOVE_FEATURES
from servegym.envs.observation import Column, Table
from servegym.envs.preemption_batch import ENGINE_FEATURES
from servegym.envs.retention_kernels import TIER_FEATURES
from servegym.envs.settings import ClusterSettings, one_of
from servegym.errors import ConfigError
from servegym.policy.contract import (
    NUM_OBSERVED_REQUEST_FEATURES,
    REQUEST_FEATURES,
    Feature,
    Group,
)
from servegym.policy.ordering import ORDERING_FEATURES
from servegym.typing import Float32Array, FloatArray, IntArray

Rewards = Literal["shared", "team", "class"]
Observation = dict[str, Any]

DISPATCHER = "dispatcher_0"
CONTROLLER = "controller_0"
_IS_PREEMPTION = Feature(
    "is_preemption", 0, 1, "-", Group.COUNTERS, "1 if it is asked whom to preempt"
)
_IS_RETENTION = Feature(
    "is_retention", 0, 1, "-", Group.COUNTERS, "1 if it is asked what becomes of a turn's KV"
)
_IS_ASKED = Feature("is_asked", 0, 1, "-", Group.COUNTERS, "1 for the agent whose decision is due")


class AgentViews:
    """The agents of the fleets of a batch.

    Agents have places: 0 is the dispatcher, 1 + r the scheduler of replica r if engines ask
    anybody, behind them the controller if requests migrate.

    Args:
        batch: The fleets.
        can_pass: Whether agents have an action more, the last, for when they are not asked.

    Attributes:
        possible_agents: Names of the agents of the largest fleet.
        place: Their places by name.
        classes: Names of the kinds of agents that there are.
        class_of: To which of them each possible agent belongs.
        num_others: Agents behind the schedulers.
        num_actions: Of each possible agent.
        action_spaces: By name.
        observation_spaces: By name, a `Dict` of `observation` and `action_mask`.
        state_space: Of one row of `states`.
    """

    def __init__(self, batch: ClusterBatch, *, can_pass: bool) -> None:
        self.batch = batch
        width = batch.num_schedulers
        others = [CONTROLLER] * (batch.controller > 0)
        self.possible_agents = [DISPATCHER, *(f"scheduler_{r}" for r in range(width)), *others]
        self.place = {name: i for i, name in enumerate(self.possible_agents)}
        self.class_of = [name.rpartition("_")[0] for name in self.possible_agents]
        self.classes = list(dict.fromkeys(self.class_of))
        self.num_others = len(others)
        self.num_actions = [
            self.own_actions(i)[1] + can_pass for i in range(len(self.possible_agents))
        ]
        self._make_spaces()
        of_engine: list[Float32Array | int] = []
        if self._orders:
            of_engine += [batch.requests, batch.engine, KIND_PREEMPT]
        if batch.num_answers:
            of_engine += [batch.turn, batch.tiers, KIND_RETAIN]
        self._parts: dict[str, list[Float32Array | int]] = {
            "dispatcher": [batch.replicas, batch.request],
            "scheduler": of_engine,
            "controller": [batch.moves],
        }
        self._views = batch.views()
        replicas = (batch.num_envs, batch.num_replicas)
        schedulers = (batch.num_envs, width)
        self._fleets = FleetViews(
            np.zeros((*replicas, len(batch.shown)), np.float32),
            np.zeros((batch.num_envs, NUM_OBSERVED_REQUEST_FEATURES), np.float32),
            np.zeros((*schedulers, len(ENGINE_FEATURES) * self._orders), np.float32),
            np.zeros((*schedulers, len(TIER_FEATURES) * (batch.num_answers > 0)), np.float32),
        )

    @property
    def _orders(self) -> bool:
        """Whether schedulers admit and preempt."""
        return self.batch.requests.shape[1] > 0

    def _make_spaces(self) -> None:
        """Make what agents and the state are made of, and their spaces."""
        batch, normalise = self.batch, self.batch.settings.normalise
        rows = batch.requests.shape[1]
        columns = [*batch.shown * batch.num_replicas]
        columns += REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES]
        of_engine: list[Column] = []
        own: list[Column] = []
        if rows:
            own += ENGINE_FEATURES
            of_engine += [*ORDERING_FEATURES * rows, *ENGINE_FEATURES, _IS_PREEMPTION]
        if batch.num_answers:
            own += TIER_FEATURES
            of_engine += [*batch.turn_features, *TIER_FEATURES, _IS_RETENTION]
        of_moves = [*MOVE_FEATURES * batch.moves.shape[1]]
        parts = {"dispatcher": columns, "scheduler": of_engine, "controller": of_moves}
        self._tables = {kind: Table(parts[kind], (len(parts[kind]),)) for kind in self.classes}
        of_fleet: list[Column] = [
            *columns,
            *own * batch.num_schedulers,
            *batch.turn_features,
            *of_moves,
        ]
        of_fleet += [_IS_ASKED] * len(self.possible_agents)
        self._fleet_table = Table(of_fleet, (len(of_fleet),))
        self.state_space = self._fleet_table.space(normalise)
        self.action_spaces = {
            name: spaces.Discrete(n)
            for name, n in zip(self.possible_agents, self.num_actions, strict=True)
        }
        self.observation_spaces = {
            name: spaces.Dict(
                {
                    "observation": self._tables[kind].space(normalise),
                    "action_mask": spaces.MultiBinary(n),
                }
            )
            for name, kind, n in zip(
                self.possible_agents, self.class_of, self.num_actions, strict=True
            )
        }

    def own_actions(self, i: int) -> tuple[int, int]:
        """Return the first of an agent's actions, and how many there are, without passing."""
        batch = self.batch
        if i == batch.controller:
            return batch.first_move, batch.num_moves
        return (0, batch.num_dispatch) if i == 0 else (batch.num_dispatch, batch.num_scheduled)

    def size(self, env: int) -> int:
        """Return how many schedulers take part in the episode of a fleet."""
        if not self.batch.num_schedulers:
            return 0
        return int(self.batch.simulator.state.env[env]["num_replicas"])

    def present(self, env: int) -> list[str]:
        """Return who takes part in the episode of a fleet."""
        last = len(self.possible_agents) - self.num_others
        return self.possible_agents[: 1 + self.size(env)] + self.possible_agents[last:]

    def earned(self, rewards: Rewards, asked: IntArray) -> FloatArray:
        """Return what agents earned in the last step, `float64[num_envs, agents]`.

        Args:
            rewards: Who earns what; see `envs.cluster_v0`.
            asked: Who had acted in it, places, `int64[num_envs]`.
        """
        batch, count = self.batch, len(self.possible_agents)
        each = np.empty((batch.num_envs, count))
        each[:] = batch.reward[:, None]
        if rewards == "team":
            sizes = [1 + self.size(env) + self.num_others for env in range(batch.num_envs)]
            each /= np.array(sizes)[:, None]
        elif rewards == "class":
            settings = batch.settings
            fine = settings.invalid_penalty * (settings.invalid_action == "penalise")
            fines = fine * batch.invalid
            each += fines[:, None]
            width = batch.num_schedulers
            each[:, 1 : 1 + width] = batch.of_replica[:, :width]
            each[np.arange(batch.num_envs), asked] -= fines
        return each

    def look(self, env: int, first: int, stop: int) -> list[Float32Array]:
        """Return what agents `first..stop-1` of a fleet see, whoever is asked, fresh arrays."""
        batch, v = self.batch, self._views
        kinds = self.class_of[first:stop]
        seen: list[Float32Array] = []
        if first == batch.controller:
            seen.append(batch.look_at_moves(env).ravel())
        else:
            batch.look(env, first, stop, v)
            if first == 0:
                seen.append(np.concatenate((v.replicas.ravel(), v.request)))
            begin, end = max(first - 1, 0), stop - 1
            if end > begin:
                seen.extend(np.concatenate(self._scheduler_views(env, begin, end), axis=1))
        if batch.settings.normalise:
            tables = [self._tables[kind] for kind in kinds]
            seen = [table.normalised(part) for table, part in zip(tables, seen, strict=True)]
        return seen

    def _scheduler_views(self, env: int, begin: int, end: int) -> list[Float32Array]:
        """Return what has been written for the schedulers of replicas `begin..end-1`."""
        batch, v = self.batch, self._views
        r = int(batch.agent[env]) - 1 - begin
        preempts, retains = np.zeros((2, end - begin, 1), np.float32)
        turn = np.zeros((end - begin, v.turn.shape[0]), np.float32)
        if 0 <= r < end - begin:
            preempts[r] = batch.kind[env] == KIND_PREEMPT
            retains[r] = batch.kind[env] == KIND_RETAIN
            turn[r] = v.turn
        parts: list[Float32Array] = []
        if self._orders:
            requests = v.requests[begin:end].reshape(end - begin, -1)
            parts += [requests, v.engine[begin:end], preempts]
        if batch.num_answers:
            parts += [turn, v.tiers[begin:end], retains]
        return parts

    def asked(self, kind: str, envs: IntArray) -> Float32Array:
        """Return what the agents of one class that are asked see, a fresh array.

        Args:
            kind: Their class.
            envs: Fleets in which one of it is asked, `int64[n]`.

        Returns:
            `float32[n, size]`. As `look`, but that a scheduler that is asked about a turn sees no
            requests, and one that is asked about requests no tiers.
        """
        batch, table = self.batch, self._tables[kind]
        raw = np.empty((len(envs), table.size), np.float32)
        first = 0
        for part in self._parts[kind]:
            if isinstance(part, int):  # whether that is what is asked
                raw[:, first] = batch.kind[envs] == part
                first += 1
                continue
            rows = part.reshape(batch.num_envs, -1)
            arguments = (rows, envs, raw, first)
            fixed(gather, *arguments)(*arguments)
            first += rows.shape[1]
        return table.normalised(raw) if batch.settings.normalise else raw

    def states(self) -> Float32Array:
        """Return what a centralised critic may see of each fleet, `float32[num_envs, n]`.

        The dispatcher's observation (its request is 0 where no dispatch is due), the own features
        of each engine and of its tiers, the turn that is asked about, the controller's observation,
        and who is asked, one number an agent.
        """
        batch, v, count = self.batch, self._fleets, self.batch.num_envs
        p, s = batch.simulator.params, batch.simulator.state
        arguments = (p, s, batch.kernel_settings, v, 0, count, batch.own_memory)
        fixed(look_at_fleets, *arguments)(*arguments)
        asked = np.zeros((count, len(self.possible_agents)), np.float32)
        asked[np.arange(count), batch.agent] = ~batch.done
        engine = np.concatenate((v.engine, v.tiers), axis=2)
        parts = [v.replicas.reshape(count, -1), v.request, engine.reshape(count, -1), batch.turn]
        if self.num_others:
            parts.append(np.stack([batch.look_at_moves(env).ravel() for env in range(count)]))
        raw = np.concatenate((*parts, asked), axis=1)
        return self._fleet_table.normalised(raw) if batch.settings.normalise else raw


def check_rewards(rewards: str, settings: ClusterSettings) -> None:
    """Check who is to earn what.

    Raises:
        ConfigError: If it is unknown, or cannot be told apart with such a shaping.
    """
    one_of(rewards=(rewards, get_args(Rewards)))
    if rewards == "class" and settings.shaping != "none":
        raise ConfigError(
            f'rewards="class" must have shaping="none", got {settings.shaping!r}: the potential '
            "is that of the whole fleet"
        )
