"""A batch of dispatch episodes over one simulator: what all environment classes share."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gymnasium import spaces

from servegym.cluster.kernels import advance
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import DONE
from servegym.envs.kernels import first_invalid, step_range, write_observation
from servegym.errors import ConfigError, InvalidAction, ResetNeeded
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_REQUEST_FEATURES,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
)
from servegym.scenario import Scenario, load_scenario
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray

_NEEDS = int(Group.COUNTERS | Group.METRICS | Group.PREFIX)


class EpisodeBatch:
    """`num_envs` environments that play episodes of one scenario.

    Attributes:
        scenario: What episodes are drawn from.
        num_envs: Environments.
        width: Replica rows; fleets may be smaller.
        num_actions: Replicas, then hold and reject where the scenario allows them.
        replicas: Observation, `float32[num_envs, width, NUM_OBSERVED_FEATURES]`.
        request: Observation, `float32[num_envs, NUM_REQUEST_FEATURES]`.
        mask: Allowed actions, 1 is allowed, `int8[num_envs, num_actions]`.
        reward: Of the last step, `float32[num_envs]`.
        done: Whether the episode ended in the last step, `bool[num_envs]`.
        dt_s: Simulated seconds between the last two decisions, `float64[num_envs]`.
        input_id: Which arrival sequence an environment plays, `int64[num_envs]`.
    """

    def __init__(
        self,
        scenario: Scenario | str,
        num_envs: int,
        *,
        load: float | tuple[float, float] = 1.0,
        num_requests: int | None = None,
        r_max: int | None = None,
        objective: str | None = None,
        reward_scale: float = 1.0,
        group_size: int = 1,
        num_threads: int = 1,
    ) -> None:
        if num_envs < 1 or group_size < 1 or num_threads < 1:
            raise ConfigError("num_envs, group_size and num_threads must be at least 1")
        self.scenario = load_scenario(scenario) if isinstance(scenario, str) else scenario
        self.objective = objective or self.scenario.objective
        if self.objective not in ("latency", "goodput"):
            raise ConfigError(f"objective must be latency or goodput, got {self.objective!r}")
        self.width = r_max or self.scenario.max_replicas
        if self.width < self.scenario.max_replicas:
            raise ConfigError(
                f"r_max ({r_max}) must be at least the {self.scenario.max_replicas} replicas "
                f"of scenario {self.scenario.name}"
            )
        if not reward_scale > 0:
            raise ConfigError(f"reward_scale must be above 0, got {reward_scale}")
        self.num_envs, self.group_size = num_envs, group_size
        self._load, self._num_requests, self._scale = load, num_requests, reward_scale
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None
        self._num_threads = num_threads
        actions = self.scenario.actions
        self.num_actions = self.width + actions.hold + actions.reject
        self.replicas: Float32Array = np.zeros(
            (num_envs, self.width, NUM_OBSERVED_FEATURES), np.float32
        )
        self.request: Float32Array = np.zeros((num_envs, NUM_REQUEST_FEATURES), np.float32)
        self.mask: Int8Array = np.zeros((num_envs, self.num_actions), np.int8)
        self.reward: Float32Array = np.zeros(num_envs, np.float32)
        self.done: BoolArray = np.ones(num_envs, np.bool_)
        self.dt_s: FloatArray = np.zeros(num_envs)
        self.input_id: IntArray = np.zeros(num_envs, np.int64)
        self._seed = 0
        self._count = np.zeros(num_envs, np.int64)
        self._simulator: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The simulator; there is one after the first reset."""
        if self._simulator is None:
            raise ResetNeeded("call reset before step")
        return self._simulator

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

    def seed(self, seed: int) -> None:
        """Start the sequence of episodes anew."""
        self._seed = seed
        self._count[:] = 0

    def draw(self, env: int) -> Episode:
        """Draw the next episode of one environment; its group plays the same requests."""
        group = env // self.group_size
        entropy = np.random.SeedSequence((self._seed, group, int(self._count[env])))
        seed, number = (int(x) for x in entropy.generate_state(2, np.uint64))
        load = self._load
        if not isinstance(load, float | int):
            load = load[0] + (load[1] - load[0]) * (number / 2.0**64)
        self.input_id[env] = group
        self._count[env] += 1
        return self.scenario.episode(seed, load=load, num_requests=self._num_requests)

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
                np.empty(self.width + 2, np.bool_),
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
        actions = np.ascontiguousarray(actions, np.int64)
        if actions.shape != (self.num_envs,):
            raise InvalidAction(
                f"there must be one action for each of {self.num_envs} environments, "
                f"got shape {actions.shape}"
            )
        bad = first_invalid(simulator.params, simulator.state, actions, active)
        if bad >= 0:
            raise InvalidAction(
                f"action {int(actions[bad])} is not allowed in environment {bad}: "
                f"choose one of {np.flatnonzero(self.mask[bad]).tolist()} (see action_mask)"
            )
        if self._pool is None:
            self._step_range(0, self.num_envs, actions, active)
            return
        edges = np.linspace(0, self.num_envs, self._num_threads + 1).astype(int).tolist()
        jobs = [
            self._pool.submit(self._step_range, first, stop, actions, active)
            for first, stop in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()

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
            np.empty(self.width + 2, np.bool_),
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

    def summary(self, env: int) -> dict[str, float]:
        """Mean latencies of an episode that has ended."""
        done = self.simulator.outcomes(env)
        kept = done[~done["rejected"]]
        return {
            "mean_e2e_s": float(np.mean(kept["finish_s"] - kept["arrival_s"])) if len(kept) else 0,
            "mean_ttft_s": float(np.mean(kept["first_token_s"] - kept["arrival_s"]))
            if len(kept)
            else 0,
            "num_rejected": float(done["rejected"].sum()),
        }

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
