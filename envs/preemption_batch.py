"""A batch of preemption episodes: whom an engine admits next, whom it preempts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import ALWAYS, NEVER, WHERE_IT_MATTERS, Asks
from servegym.envs.batch import one_of
from servegym.envs.observation import Table
from servegym.envs.preemption_kernels import Output, Settings, begin, step_range, write_choice
from servegym.envs.request_batch import RequestBatch
from servegym.envs.request_scene import engine_scene
from servegym.envs.scene import Scene
from servegym.errors import ConfigError
from servegym.policy.ordering import NUM_ORDERING_FEATURES, ORDERING_FEATURES, OrderingFeature
from servegym.scenario import Scenario
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray

QueueOrder = Literal["shortest", "arrival"]

#: The engine's own features: the last columns of each row.
ENGINE_FEATURES = ORDERING_FEATURES[int(OrderingFeature["NUM_RUNNING"]) :]
#: Episodes that are drawn in search of one with a choice.
_MAX_DRAWS = 100


class PreemptionBatch(RequestBatch):
    """`num_envs` environments that admit and preempt requests of one engine; see `RequestBatch`.

    Args:
        num_envs: Environments.
        scenario: A name, a path or a `Scenario`, of one replica with `engine: vllm-priority`.
        max_waiting: Rows for waiting requests.
        queue_order: By what a longer queue is cut.
        allow_none: Whether nobody may be admitted.
        settings: See `RequestBatch`.

    Attributes:
        max_waiting: Rows for waiting requests.
        max_running: Rows for running requests: the engine's `max_num_seqs`.
        num_actions: Rows, then, if allowed, nobody.
        requests: Observation, `float32[num_envs, max_waiting + max_running, 17]`.
        engine: Observation, `float32[num_envs, 5]`.
        kind: Observation, 0 to admit and 1 to preempt, `int8[num_envs]`.
    """

    metric_names: ClassVar[tuple[str, ...]] = (*RequestBatch.metric_names, "num_preemptions")

    def __init__(
        self,
        num_envs: int,
        scenario: Scenario | str = "kv-starved",
        *,
        max_waiting: int = 64,
        queue_order: QueueOrder = "shortest",
        allow_none: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(num_envs, scenario, **settings)
        if not self.scenario.orders_requests:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority, as kv-starved has"
            )
        if max_waiting < 2:
            raise ConfigError(f"max_waiting must be at least 2, got {max_waiting}")
        one_of(queue_order=(queue_order, get_args(QueueOrder)))
        self.max_waiting = max_waiting
        self.max_running = self.scenario.spec.types[0].max_num_seqs
        rows = (max_waiting + self.max_running, NUM_ORDERING_FEATURES)
        self._allocate(
            rows[0] + allow_none,
            {
                "requests": Table(ORDERING_FEATURES, rows),
                "engine": Table(ENGINE_FEATURES, (len(ENGINE_FEATURES),)),
            },
            {"kind": spaces.Discrete(2)},
        )
        self._asks = Asks(
            dispatch=NEVER,
            admit=ALWAYS if allow_none else WHERE_IT_MATTERS,
            preempt=WHERE_IT_MATTERS,
        )
        self._settings = Settings(
            by_arrival=queue_order == "arrival",
            goodput=self.objective == "goodput",
            scale=self.reward_scale,
            width=max_waiting,
        )
        self.requests: Float32Array = np.zeros((num_envs, *rows), np.float32)
        self.engine: Float32Array = np.zeros((num_envs, len(ENGINE_FEATURES)), np.float32)
        self.kind: Int8Array = np.zeros(num_envs, np.int8)
        self._output = Output(
            self.requests,
            self.engine,
            self.kind,
            self.mask,
            np.zeros((num_envs, rows[0]), np.int64),
            np.zeros(num_envs),
            self.reward,
            self.done,
            self.dt_s,
        )

    def _reset(self, envs: IntArray, episodes: Sequence[Episode] | None) -> None:
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

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
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

    def _parts(self) -> dict[str, NDArray[Any]]:
        return {
            "requests": self.requests,
            "engine": self.engine,
            "kind": self.kind.astype(np.int64),
            "action_mask": self.mask,
        }

    def _rule_action(self, env: int) -> int:
        """First come, first served: admits who came first, preempts who came last."""
        rows = np.flatnonzero(self.mask[env, : self._output.ids.shape[1]])
        order = self._output.ids[env, rows]
        return int(rows[order.argmax() if self.kind[env] else order.argmin()])

    def summary(self, env: int) -> tuple[float, ...]:
        """Latencies, goodput and preemptions of an episode that has ended."""
        victims = self.simulator.state.request["num_preemptions"][env]
        return (*super().summary(env), float(victims.sum()))

    def scene(self, env: int) -> Scene:
        """Show the engine, what it runs and what waits."""
        asked = "preempt" if self.kind[env] else "admit"
        return engine_scene(self.scenario, self.simulator, env, asked)
