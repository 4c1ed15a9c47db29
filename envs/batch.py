"""A batch of dispatch episodes over one simulator: what all environment classes share."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from servegym.cluster.kernels import advance
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import DONE
from servegym.envs.kernels import first_invalid, step_range, write_observation
from servegym.envs.request_batch import RequestBatch
from servegym.errors import ConfigError, InvalidAction
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_REQUEST_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
)
from servegym.scenario import Scenario
from servegym.typing import BoolArray, Float32Array, Int8Array, IntArray

_NEEDS = int(Group.COUNTERS | Group.METRICS | Group.PREFIX)


class EpisodeBatch(RequestBatch):
    """`num_envs` environments that play episodes of one scenario; see also `RequestBatch`.

    Attributes:
        width: Replica rows; fleets may be smaller.
        num_actions: Replicas, then hold and reject where the scenario allows them.
        replicas: Observation, `float32[num_envs, width, NUM_OBSERVED_FEATURES]`.
        request: Observation, `float32[num_envs, NUM_REQUEST_FEATURES]`.
        mask: Allowed actions, 1 is allowed, `int8[num_envs, num_actions]`.
    """

    def __init__(
        self,
        scenario: Scenario | str,
        num_envs: int,
        *,
        r_max: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(scenario, num_envs, **settings)
        self.width = r_max or self.scenario.max_replicas
        if self.width < self.scenario.max_replicas:
            raise ConfigError(
                f"r_max ({r_max}) must be at least the {self.scenario.max_replicas} replicas "
                f"of scenario {self.scenario.name}"
            )
        actions = self.scenario.actions
        self.num_actions = self.width + actions.hold + actions.reject
        self.replicas: Float32Array = np.zeros(
            (num_envs, self.width, NUM_OBSERVED_FEATURES), np.float32
        )
        self.request: Float32Array = np.zeros((num_envs, NUM_REQUEST_FEATURES), np.float32)
        self.mask: Int8Array = np.zeros((num_envs, self.num_actions), np.int8)

    def observation_space(self) -> spaces.Dict:
        """Space of one environment's observation, from the contract."""
        low = np.array([f.low for f in REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]], np.float32)
        high = np.array([f.high for f in REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]], np.float32)
        q_high = np.array([f.high for f in REQUEST_FEATURES], np.float32)
        shape = (self.width, NUM_OBSERVED_FEATURES)
        return spaces.Dict(
            {
                "replicas": spaces.Box(
                    np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=np.float32
                ),
                "request": spaces.Box(np.zeros_like(q_high), q_high, dtype=np.float32),
                "action_mask": spaces.MultiBinary(self.num_actions),
            }
        )

    def reset(self, envs: IntArray, episodes: list[Episode] | None = None) -> None:
        """Start new episodes in some environments and run them to their first decisions."""
        drawn = episodes or [self.draw(env) for env in envs.tolist()]
        if self._simulator is None:
            first = drawn if len(envs) == self.num_envs else drawn[:1] * self.num_envs
            self._simulator = Simulator(self.scenario.spec, first, max_replicas=self.width)
        for env, episode in zip(envs.tolist(), drawn, strict=True):
            self.simulator.load(env, episode)
            if advance(self.simulator.params, self.simulator.state, env) == DONE:
                raise ConfigError("an episode needs at least one decision")
            write_observation(
                self.simulator.params,
                self.simulator.state,
                env,
                _NEEDS,
                NUM_OBSERVED_FEATURES,
                np.empty(NUM_REQUEST_FEATURES),
                self.replicas,
                self.request,
                self.mask,
            )
            self.done[env] = False
            self.reward[env] = 0.0
            self.dt_s[env] = 0.0

    def step(self, actions: IntArray, active: BoolArray) -> None:
        """Take a decision in every active environment.

        Raises:
            InvalidAction: If one is not allowed; then nothing has happened.
        """
        simulator = self.simulator
        actions = self.checked(actions)
        bad = first_invalid(simulator.params, simulator.state, actions, active)
        if bad >= 0:
            raise InvalidAction(
                f"action {int(actions[bad])} is not allowed in environment {bad}: "
                f"choose one of {np.flatnonzero(self.mask[bad]).tolist()} (see action_mask)"
            )
        self.in_ranges(lambda first, stop: self._step_range(first, stop, actions, active))

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        step_range(
            self.simulator.params,
            self.simulator.state,
            first,
            stop,
            actions,
            active,
            _NEEDS,
            NUM_OBSERVED_FEATURES,
            self.objective == "goodput",
            self._scale,
            np.empty(NUM_REQUEST_FEATURES),
            self.replicas,
            self.request,
            self.mask,
            self.reward,
            self.done,
            self.dt_s,
        )

    def observation(self) -> dict[str, Any]:
        """Copy the observations of all environments."""
        return {
            "replicas": self.replicas.copy(),
            "request": self.request.copy(),
            "action_mask": self.mask.copy(),
        }
