"""A batch of preemption episodes over one simulator: what all environment classes share."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import ALWAYS, NEVER, WHERE_IT_MATTERS, Asks
from servegym.envs.preemption_kernels import Output, Settings, begin, step_range, write_choice
from servegym.envs.request_batch import RequestBatch
from servegym.errors import ConfigError, InvalidAction
from servegym.policy.ordering import NUM_ORDERING_FEATURES, ORDERING_FEATURES, OrderingFeature
from servegym.scenario import Scenario
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray

QueueOrder = Literal["shortest", "arrival"]

#: The engine's own features: the last columns of each row.
ENGINE_FEATURES = ORDERING_FEATURES[int(OrderingFeature["NUM_RUNNING"]) :]
#: Episodes that are drawn in search of one with a choice.
_MAX_DRAWS = 100


class PreemptionBatch(RequestBatch):
    """`num_envs` environments that play episodes of one engine; see also `RequestBatch`.

    Attributes:
        max_waiting: Rows for waiting requests.
        max_running: Rows for running requests: the engine's `max_num_seqs`.
        num_actions: Rows, then, if allowed, nobody.
        requests: Observation, `float32[num_envs, max_waiting + max_running, 17]`.
        engine: Observation, `float32[num_envs, 5]`.
        kind: Observation, 0 to admit and 1 to preempt, `int8[num_envs]`.
        mask: Allowed actions, 1 is allowed, `int8[num_envs, num_actions]`.
    """

    def __init__(
        self,
        scenario: Scenario | str,
        num_envs: int,
        *,
        max_waiting: int = 64,
        queue_order: QueueOrder = "shortest",
        allow_none: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(scenario, num_envs, **settings)
        if not self.scenario.orders_requests:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority, as kv-starved has"
            )
        if max_waiting < 2:
            raise ConfigError(f"max_waiting must be at least 2, got {max_waiting}")
        if queue_order not in get_args(QueueOrder):
            raise ConfigError(f"queue_order must be shortest or arrival, got {queue_order!r}")
        self.max_waiting = max_waiting
        self.max_running = self.scenario.spec.types[0].max_num_seqs
        rows = max_waiting + self.max_running
        self.num_actions = rows + allow_none
        self._asks = Asks(
            dispatch=NEVER,
            admit=ALWAYS if allow_none else WHERE_IT_MATTERS,
            preempt=WHERE_IT_MATTERS,
        )
        self._settings = Settings(
            by_arrival=queue_order == "arrival",
            goodput=self.objective == "goodput",
            scale=float(self._scale),
            width=max_waiting,
        )
        self.requests: Float32Array = np.zeros((num_envs, rows, NUM_ORDERING_FEATURES), np.float32)
        self.engine: Float32Array = np.zeros((num_envs, len(ENGINE_FEATURES)), np.float32)
        self.kind: Int8Array = np.zeros(num_envs, np.int8)
        self.mask: Int8Array = np.zeros((num_envs, self.num_actions), np.int8)
        self._output = Output(
            self.requests,
            self.engine,
            self.kind,
            self.mask,
            np.zeros((num_envs, rows), np.int64),
            np.zeros(num_envs),
            self.reward,
            self.done,
            self.dt_s,
        )

    def observation_space(self) -> spaces.Dict:
        """Space of one environment's observation, from the contract."""

        def bounds(low: float, high: float) -> tuple[float, float]:
            return min(low, 0.0), high  # rows of absent requests are 0

        both = np.array([bounds(f.low, f.high) for f in ORDERING_FEATURES], np.float32).T
        shape = self.requests.shape[1:]
        own = len(ENGINE_FEATURES)
        return spaces.Dict(
            {
                "requests": spaces.Box(
                    np.broadcast_to(both[0], shape),
                    np.broadcast_to(both[1], shape),
                    dtype=np.float32,
                ),
                "engine": spaces.Box(both[0, -own:], both[1, -own:], dtype=np.float32),
                "kind": spaces.Discrete(2),
                "action_mask": spaces.MultiBinary(self.num_actions),
            }
        )

    def reset(self, envs: IntArray, episodes: list[Episode] | None = None) -> None:
        """Start new episodes in some environments and run them to their first choices.

        Raises:
            ConfigError: If a given episode has no choice, or none of many that were drawn.
        """
        for i, env in enumerate(envs.tolist()):
            for _ in range(_MAX_DRAWS):
                episode = episodes[i] if episodes else self.draw(env)
                self._load_episode(env, episode)
                if begin(self.simulator.params, self.simulator.state, env):
                    break
                if episodes:
                    raise ConfigError("the episode has no choice: nobody waits for another")
            else:
                raise ConfigError(
                    f"none of {_MAX_DRAWS} episodes of {self.scenario.name} has a choice: "
                    "raise load or num_requests"
                )
            write_choice(
                self.simulator.params,
                self.simulator.state,
                self._settings,
                self._output,
                env,
                *self._memory(),
            )
            self.done[env] = False
            self.reward[env] = 0.0
            self.dt_s[env] = 0.0
            self._output.earned[env] = 0.0

    def _load_episode(self, env: int, episode: Episode) -> None:
        if self._simulator is None:
            self._simulator = Simulator(
                self.scenario.spec, [episode] * self.num_envs, asks=self._asks
            )
        else:
            self._simulator.load(env, episode)

    def _memory(self) -> tuple[FloatArray, FloatArray]:
        """Make working memory for one thread."""
        return np.empty(NUM_ORDERING_FEATURES), np.empty(self.max_waiting)

    def step(self, actions: IntArray, active: BoolArray) -> None:
        """Pick a request in every active environment.

        Raises:
            InvalidAction: If one is not allowed; then nothing has happened.
        """
        actions = self.checked(actions)
        inside = (actions >= 0) & (actions < self.num_actions)
        chosen = np.where(inside, actions, 0)
        allowed = inside & (np.take_along_axis(self.mask, chosen[:, None], 1)[:, 0] == 1)
        bad = np.flatnonzero(active & ~allowed)
        if len(bad):
            raise InvalidAction(
                f"action {int(actions[bad[0]])} is not allowed in environment {bad[0]}: "
                f"choose one of {np.flatnonzero(self.mask[bad[0]]).tolist()} (see action_mask)"
            )

        def step(first: int, stop: int) -> None:
            step_range(
                self.simulator.params,
                self.simulator.state,
                self._settings,
                self._output,
                first,
                stop,
                actions,
                active,
                *self._memory(),
            )

        self.in_ranges(step)

    def observation(self) -> dict[str, Any]:
        """Copy the observations of all environments."""
        return {
            "requests": self.requests.copy(),
            "engine": self.engine.copy(),
            "kind": self.kind.astype(np.int64),
            "action_mask": self.mask.copy(),
        }

    def summary(self, env: int) -> dict[str, float]:
        """Mean latencies and preemptions of an episode that has ended."""
        victims = self.simulator.state.request["num_preemptions"][env]
        return {**super().summary(env), "num_preemptions": float(victims.sum())}
