"""The agents of one fleet: names, spaces, what they see and earn."""

from __future__ import annotations

import sys
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.utils.seeding import np_random

from servegym.cluster.state import OBSERVED_UP
from servegym.envs.cluster_batch import ClusterBatch
from servegym.envs.cluster_kernels import KIND_PREEMPT, KIND_RETAIN
from servegym.envs.migration_kernels import MOVE_FEATURES
from servegym.envs.observation import Column, Table
from servegym.envs.preemption_batch import ENGINE_FEATURES
from servegym.envs.retention_kernels import TIER_FEATURES
from servegym.envs.settings import ClusterSettings, make_settings, one_of
from servegym.envs.single import RENDER_MODES, check_options, check_render_mode, draw
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.policy.contract import (
    NUM_OBSERVED_REQUEST_FEATURES,
    REQUEST_FEATURES,
    Feature,
    Group,
)
from servegym.policy.ordering import ORDERING_FEATURES
from servegym.typing import Float32Array, Int8Array

Rewards = Literal["shared", "team", "class"]
Observation = dict[str, Any]

METADATA: dict[str, Any] = {
    "render_modes": [*RENDER_MODES, "human"],
    "render_fps": 10,
    "name": "cluster_v0",
}
DISPATCHER = "dispatcher_0"
CONTROLLER = "controller_0"
_IS_PREEMPTION = Feature(
    "is_preemption", 0, 1, "-", Group.COUNTERS, "1 if it is asked whom to preempt"
)
_IS_RETENTION = Feature(
    "is_retention", 0, 1, "-", Group.COUNTERS, "1 if it is asked what becomes of a turn's KV"
)
_IS_ASKED = Feature("is_asked", 0, 1, "-", Group.COUNTERS, "1 for the agent whose decision is due")


class ClusterAgents:
    """What both of PettingZoo's forms of a fleet have in common.

    Args:
        scenario: A name, a path or a `Scenario`; the default's if not given.
        rewards: Who earns what; see `envs.cluster_v0`.
        max_cycles: After how many an agent is truncated; see the two forms.
        render_mode: `rgb_array`, `ansi`, `human` (text on standard output at each step) or `None`.
        invalid_action: As in `Settings`; PettingZoo's own tools sample without masks.
        can_pass: Whether agents have an action more, the last, for when they are not asked.
        settings: See `envs.settings.ClusterSettings`; `flat`, `group_size` and `num_threads` mean
            nothing here and are refused.

    Attributes:
        batch: The batch of one that is played.
        possible_agents: The dispatcher, then, if engines ask anybody, the scheduler of each
            replica of the largest fleet, then the controller if requests migrate.
        agents: Those who take part now.
        state_space: Of `state`.
    """

    def __init__(
        self,
        scenario: Any = None,
        *,
        rewards: Rewards = "shared",
        max_cycles: int | None = None,
        render_mode: str | None = None,
        invalid_action: str = "resample",
        can_pass: bool,
        **settings: Any,
    ) -> None:
        one_of(rewards=(rewards, get_args(Rewards)))
        if max_cycles is not None and max_cycles < 1:
            raise ConfigError(f"max_cycles must be at least 1, got {max_cycles}")
        for name in ("flat", "group_size", "num_threads"):
            if name in settings:
                raise ConfigError(
                    f"{name} is for batches of environments, leave it out: agents observe one "
                    "vector each"
                )
        given = make_settings(
            ClusterSettings, scenario, {**settings, "invalid_action": invalid_action}
        )
        by_class = rewards == "class"
        if by_class and given.shaping != "none":
            raise ConfigError(
                f'rewards="class" must have shaping="none", got {given.shaping!r}: the potential '
                "is that of the whole fleet"
            )
        self.render_mode = check_render_mode(render_mode, METADATA["render_modes"])
        self.max_cycles = max_cycles
        self.batch = ClusterBatch(1, given, by_replica=by_class)
        self.batch.narrates = self.render_mode is not None
        self._rewards = rewards
        width = self.batch.num_schedulers
        self.possible_agents = [DISPATCHER, *(f"scheduler_{r}" for r in range(width))]
        self._others = [CONTROLLER] * (self.batch.controller > 0)
        self.possible_agents += self._others
        self._place = {name: i for i, name in enumerate(self.possible_agents)}
        self._num_schedulers = width
        self.agents: list[str] = []
        sizes = [n + can_pass for n in (self.batch.num_dispatch, self.batch.num_scheduled)]
        self._num_actions = [sizes[0], *[sizes[1]] * width]
        self._num_actions += [self.batch.num_moves + can_pass] * len(self._others)
        self._make_spaces(given.normalise)
        self._idle_masks = [np.zeros(n, np.int8) for n in self._num_actions]
        for mask in self._idle_masks:
            mask[-1 if can_pass else 0] = 1
        self._views = self.batch.views()
        self._everyone = np.ones(1, np.bool_)
        self._ready = False

    def _make_spaces(self, normalise: bool) -> None:
        """Make what agents and the state are made of, and their spaces."""
        width, rows = self.batch.num_schedulers, self.batch.requests.shape[1]
        replicas = self.batch.shown * self.batch.num_replicas
        columns = [*replicas, *REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES]]
        of_engine: list[Column] = []
        own: list[Column] = []
        if rows:
            own += ENGINE_FEATURES
            of_engine += [*ORDERING_FEATURES * rows, *ENGINE_FEATURES, _IS_PREEMPTION]
        if self.batch.num_answers:
            own += TIER_FEATURES
            of_engine += [*self.batch.turn_features, *TIER_FEATURES, _IS_RETENTION]
        of_moves = [*MOVE_FEATURES * self.batch.moves.shape[1]]
        of_fleet = [*columns, *own * width, *self.batch.turn_features, *of_moves]
        of_fleet += [_IS_ASKED] * len(self.possible_agents)
        parts = [columns, *[of_engine] * width, *[of_moves] * len(self._others)]
        self._tables = [Table(part, (len(part),)) for part in parts]
        self._fleet_table = Table(of_fleet, (len(of_fleet),))
        self.state_space = self._fleet_table.space(normalise)
        self._action_spaces = {
            name: spaces.Discrete(n)
            for name, n in zip(self.possible_agents, self._num_actions, strict=True)
        }
        self._observation_spaces = {
            name: spaces.Dict(
                {
                    "observation": self._tables[self._place[name]].space(normalise),
                    "action_mask": spaces.MultiBinary(n),
                }
            )
            for name, n in zip(self.possible_agents, self._num_actions, strict=True)
        }

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        """Space of an agent's observation: a `Dict` of `observation` and `action_mask`."""
        return self._observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Discrete:
        """Space of an agent's action, a `Discrete`."""
        return self._action_spaces[agent]

    def render(self) -> Any:
        """Draw what is to be seen now, as `render_mode` says."""
        if self.render_mode != "human":
            return draw(self.batch, 0, self.render_mode)
        sys.stdout.write(draw(self.batch, 0, "ansi"))
        return None

    def state(self) -> Float32Array:
        """What a centralised critic may see, `float32[n]`.

        The dispatcher's observation (its request is 0 where no dispatch is due), the own features
        of each engine and of its tiers, the turn that is asked about, the controller's observation,
        and who is asked, one number an agent.
        """
        batch, v = self.batch, self._views
        batch.look(0, 0, 1 + self._num_schedulers, v)
        own = [v.engine] * bool(batch.requests.shape[1]) + [v.tiers] * bool(batch.num_answers)
        engine = np.concatenate((*own, np.zeros((batch.num_schedulers, 0), np.float32)), axis=1)
        engine[self._num_schedulers :] = 0.0
        asked = np.zeros(len(self.possible_agents), np.float32)
        if not batch.done[0]:
            asked[batch.agent[0]] = 1.0
        parts = [v.replicas.ravel(), v.request, engine.ravel(), v.turn]
        if self._others:
            parts.append(batch.look_at_moves(0).ravel())
        raw = np.concatenate((*parts, asked))
        return self._fleet_table.normalised(raw) if batch.settings.normalise else raw

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()

    def close(self) -> None:
        """End; the environment cannot be used any more."""
        self.batch.close()

    def _begin(self, seed: int | None, options: dict[str, Any] | None) -> None:
        """Start an episode."""
        # PettingZoo's tests give an option named "options"
        episode = check_options(options, ("episode", "options")).get("episode")
        if not isinstance(episode, self.batch.episode_type | None):
            raise ConfigError(f"episode must be an Episode, got {type(episode).__name__}")
        if seed is not None or not self._ready:
            self.batch.seed(int(np_random(seed)[0].integers(1 << 62)))
        self.batch.reset(np.zeros(1, np.int64), None if episode is None else [episode])
        self._ready = True
        if self.batch.num_schedulers:
            self._num_schedulers = int(self.batch.simulator.state.env[0]["num_replicas"])
        self.agents = self.possible_agents[: 1 + self._num_schedulers] + self._others

    @property
    def _asked(self) -> str:
        """Who is asked."""
        return self.possible_agents[self.batch.agent[0]]

    def _decide(self, action: Any) -> dict[str, float]:
        """Take the decision that is due; return what each possible agent earns."""
        if not self._ready or self.batch.done[0] or self.batch.truncated[0]:
            raise ResetNeeded("the episode is over or none has begun: call reset")
        batch, asked = self.batch, int(self.batch.agent[0])
        first, count = self._own_actions(asked)
        try:
            chosen = int(action)
        except (TypeError, ValueError):
            raise InvalidAction(
                f"the action of {self._asked} must be a whole number, got {action!r}"
            ) from None
        # behind its own actions begin another agent's: those are as wrong as any out of range
        inside = 0 <= chosen < count
        if batch.settings.invalid_action == "raise":
            own = batch.mask[0, first : first + count]
            if not (inside and own[chosen]):
                raise InvalidAction(
                    f"action {chosen} of {self._asked} is not allowed: choose one of "
                    f"{np.flatnonzero(own).tolist()} (see action_mask)"
                )
        batch.step(np.array([first + chosen if inside else -1]), self._everyone)
        return self._earned(asked)

    def _own_actions(self, i: int) -> tuple[int, int]:
        """Return the first of an agent's actions, and how many there are, without passing."""
        batch = self.batch
        if i == batch.controller:
            return batch.first_move, batch.num_moves
        return (0, batch.num_dispatch) if i == 0 else (batch.num_dispatch, batch.num_scheduled)

    def _earned(self, asked: int) -> dict[str, float]:
        batch, names = self.batch, self.possible_agents
        earned = float(batch.reward[0])
        if self._rewards == "shared":
            return dict.fromkeys(names, earned)
        if self._rewards == "team":
            num_agents = 1 + self._num_schedulers + len(self._others)
            return dict.fromkeys(names, earned / num_agents)
        settings = batch.settings
        penalises = settings.invalid_action == "penalise" and bool(batch.invalid[0])
        penalty = float(settings.invalid_penalty) if penalises else 0.0
        each = [earned + penalty, *batch.of_replica[0, : batch.num_schedulers].tolist()]
        each += [earned + penalty] * len(self._others)
        each[asked] -= penalty
        return dict(zip(names, each, strict=True))

    def _look(self, first: int, stop: int) -> list[Float32Array]:
        """Return what agents `first..stop-1` see, fresh arrays."""
        batch, v = self.batch, self._views
        if first == batch.controller:
            raw = batch.look_at_moves(0).ravel()
            return [self._tables[first].normalised(raw) if batch.settings.normalise else raw]
        batch.look(0, first, stop, v)
        seen: list[Float32Array] = []
        if first == 0:
            seen.append(np.concatenate((v.replicas.ravel(), v.request)))
        begin, end = max(first - 1, 0), stop - 1
        if end > begin:
            seen.extend(np.concatenate(self._scheduler_views(begin, end), axis=1))
        if batch.settings.normalise:
            seen = [self._tables[i].normalised(part) for i, part in enumerate(seen, start=first)]
        return seen

    def _scheduler_views(self, begin: int, end: int) -> list[Float32Array]:
        """Return what has been written for the schedulers of replicas `begin..end-1`."""
        batch, v = self.batch, self._views
        r = int(batch.agent[0]) - 1 - begin
        preempts, retains = np.zeros((2, end - begin, 1), np.float32)
        turn = np.zeros((end - begin, v.turn.shape[0]), np.float32)
        if 0 <= r < end - begin:
            preempts[r] = batch.kind[0] == KIND_PREEMPT
            retains[r] = batch.kind[0] == KIND_RETAIN
            turn[r] = v.turn
        parts: list[Float32Array] = []
        if batch.requests.shape[1]:
            requests = v.requests[begin:end].reshape(end - begin, -1)
            parts += [requests, v.engine[begin:end], preempts]
        if batch.num_answers:
            parts += [turn, v.tiers[begin:end], retains]
        return parts

    def _mask(self, i: int) -> Int8Array:
        """Return the mask of an agent; of one that is not asked one action: samplers need it."""
        batch = self.batch
        if i != batch.agent[0] or batch.done[0]:
            return self._idle_masks[i].copy()
        mask = np.zeros(self._num_actions[i], np.int8)
        first, count = self._own_actions(i)
        mask[:count] = batch.mask[0, first : first + count]
        return mask

    def _observations(self, names: list[str]) -> dict[str, Observation]:
        """Return the observations of agents, the first ones or all of the episode."""
        others = len(self._others)
        seen = self._look(0, len(names) - others)
        for name in names[len(names) - others :]:
            seen += self._look(self._place[name], self._place[name] + 1)
        return {
            name: {"observation": part, "action_mask": self._mask(self._place[name])}
            for name, part in zip(names, seen, strict=True)
        }

    def _infos(self, names: list[str]) -> dict[str, dict[str, Any]]:
        """Return the infos of agents."""
        batch = self.batch
        state = batch.simulator.state
        up = [True, *(state.observation[0, OBSERVED_UP] > 0.0).tolist()]
        up[1 + batch.num_schedulers :] = [True] * len(self._others)
        asked = -1 if batch.done[0] else int(batch.agent[0])
        metrics = dict(zip(batch.metric_names, batch.metrics[:, 0].tolist(), strict=True))
        common = {
            "now_s": float(state.env["now_s"][0]),
            "dt_s": float(batch.dt_s[0]),
            "input_id": int(batch.input_id[0]),
            "invalid_action": bool(batch.invalid[0]),
        }
        place = self._place
        return {
            name: {
                "is_asked": place[name] == asked,
                "is_up": up[place[name]],
                **common,
                "episode_metrics": metrics.copy(),
            }
            for name in names
        }
