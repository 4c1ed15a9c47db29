"""A batch of preemption episodes: whom an engine admits next, whom it preempts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from servegym.cluster.jit import fixed
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import ALWAYS, NEVER, WHERE_IT_MATTERS, Asks
from servegym.envs.observation import Table
from servegym.envs.preemption_kernels import KernelSettings, Output, begin, step_range
from servegym.envs.request_batch import RequestBatch
from servegym.envs.request_scene import engine_scene, pick_deed
from servegym.envs.scene import Scene
from servegym.envs.settings import PreemptionSettings
from servegym.errors import ConfigError
from servegym.policy.ordering import NUM_ORDERING_FEATURES, NUM_RUNNING, ORDERING_FEATURES
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray

#: The engine's own features: the last columns of each row.
ENGINE_FEATURES = ORDERING_FEATURES[NUM_RUNNING:]


class PreemptionBatch(RequestBatch):
    """`num_envs` environments that admit and preempt requests of one engine; see `RequestBatch`.

    Args:
        num_envs: Environments.
        settings: What it was told.

    Attributes:
        max_waiting: Rows for waiting requests.
        max_running: Rows for running requests: the engine's `max_num_seqs`.
        num_actions: Rows, then, if allowed, nobody.
        requests: Observation, `float32[num_envs, max_waiting + max_running, 17]`.
        engine: Observation, `float32[num_envs, 5]`.
        kind: Observation, 0 to admit and 1 to preempt, `int8[num_envs]`.
    """

    metric_names: ClassVar[tuple[str, ...]] = (*RequestBatch.metric_names, "num_preemptions")

    max_redraws = 99
    settings_type = PreemptionSettings
    settings: PreemptionSettings

    def __init__(self, num_envs: int, settings: PreemptionSettings) -> None:
        super().__init__(num_envs, settings)
        if not self.scenario.orders_requests:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority, as kv-starved has"
            )
        self.max_waiting = settings.max_waiting
        self.max_running = self.scenario.spec.types[0].max_num_seqs
        rows = (self.max_waiting + self.max_running, NUM_ORDERING_FEATURES)
        self._allocate(
            rows[0] + settings.allow_none,
            {
                "requests": Table(ORDERING_FEATURES, rows),
                "engine": Table(ENGINE_FEATURES, (len(ENGINE_FEATURES),)),
            },
            {"kind": spaces.Discrete(2)},
        )
        self._asks = Asks(
            dispatch=NEVER,
            admit=ALWAYS if settings.allow_none else WHERE_IT_MATTERS,
            preempt=WHERE_IT_MATTERS,
        )
        self._kernel_settings = KernelSettings(
            by_arrival=settings.queue_order == "arrival",
            goodput=self.objective == "goodput",
            scale=float(self.reward_scale),
            width=self.max_waiting,
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

    def _make_simulator(self, episodes: list[Episode]) -> Simulator:
        return Simulator(self.scenario.spec, episodes, asks=self._asks)

    def _begin(self, env: int, episode: Episode) -> bool:
        self.simulator.load(env, episode)
        p, s = self.simulator.params, self.simulator.state
        return begin(p, s, self._kernel_settings, self._output, env, *self._memory())

    def _no_decision(self, drawn: bool) -> str:
        if not drawn:
            return "the episode has no choice: nobody waits for another"
        return (
            f"none of {self.max_redraws + 1} episodes of {self.scenario.name} has a choice: "
            "raise load or num_requests"
        )

    def _memory(self) -> tuple[FloatArray, FloatArray]:
        """Make working memory for one thread."""
        return np.empty(NUM_ORDERING_FEATURES), np.empty(self.max_waiting)

    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        p, s = self.simulator.params, self.simulator.state
        c, o = self._kernel_settings, self._output
        arguments = (p, s, c, o, first, stop, actions, active, *self._memory())
        fixed(step_range, *arguments)(*arguments)

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

    def _deed(self, env: int, action: int) -> str:
        return pick_deed(self.simulator, env, self._output.ids[env], action)

    def scene(self, env: int) -> Scene:
        """Show the engine, what it runs and what waits."""
        asked = "preempt" if self.kind[env] else "admit"
        return engine_scene(self.scenario, self.simulator, env, asked)
