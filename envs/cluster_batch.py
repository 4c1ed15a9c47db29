"""A batch of cluster episodes: where requests go, and whom each engine admits or preempts."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from typing_extensions import override

from servegym.cluster.jit import fixed
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import ALWAYS, WHERE_IT_MATTERS, Asks
from servegym.envs.cluster_kernels import (
    KIND_DISPATCH,
    KIND_PREEMPT,
    NUM_KINDS,
    KernelSettings,
    Memory,
    Output,
    Views,
    begin,
    look,
    step_range,
)
from servegym.envs.observation import Table
from servegym.envs.preemption_batch import ENGINE_FEATURES
from servegym.envs.request_batch import RequestBatch
from servegym.envs.request_scene import cluster_scene, dispatch_deed, pick_deed
from servegym.envs.scene import Scene
from servegym.envs.settings import ClusterSettings
from servegym.errors import ConfigError
from servegym.policy.contract import (
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    NUM_REQUEST_FEATURES,
    OUTSTANDING_REQUESTS,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
)
from servegym.policy.layout import scenario_actions
from servegym.policy.ordering import NUM_ORDERING_FEATURES, ORDERING_FEATURES
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class ClusterBatch(RequestBatch):
    """`num_envs` fleets of engines that ask a dispatcher and their schedulers; see `RequestBatch`.

    Actions are those of a dispatch, then the rows of requests, then, if allowed, nobody. What is
    observed is what the agent that is asked sees; the other arrays are 0.

    Args:
        num_envs: Environments.
        settings: What it was told.
        by_replica: Whether `of_replica` is kept up to date.

    Attributes:
        num_replicas: Replica rows, R; fleets may be smaller.
        num_dispatch: Actions of a dispatch.
        num_picks: Actions of a scheduler.
        max_waiting: Rows for waiting requests.
        max_running: Rows for running requests: the largest `max_num_seqs`.
        replicas: Observation, `float32[num_envs, R, NUM_OBSERVED_FEATURES]`.
        request: Observation, `float32[num_envs, NUM_OBSERVED_REQUEST_FEATURES]`.
        requests: Observation, `float32[num_envs, max_waiting + max_running, 17]`.
        engine: Observation, `float32[num_envs, 5]`.
        kind: What is asked, 0 to dispatch, 1 to admit, 2 to preempt, `int8[num_envs]`; observed
            as one number a kind.
        agent: Who is asked, 0 the dispatcher, 1 + r the scheduler of replica r, `int64[num_envs]`;
            observed as one number an agent.
        of_replica: The part of the last reward that each replica's own requests are, before
            shaping and penalties, `float64[num_envs, R]`.
    """

    metric_names: ClassVar[tuple[str, ...]] = (*RequestBatch.metric_names, "num_preemptions")
    settings_type = ClusterSettings
    settings: ClusterSettings

    def __init__(
        self, num_envs: int, settings: ClusterSettings, *, by_replica: bool = False
    ) -> None:
        super().__init__(num_envs, settings)
        types = self.scenario.spec.types
        if self.scenario.max_replicas < 2 or {t.engine for t in types} != {"vllm-priority"}:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of two replicas or more with "
                "engine: vllm-priority in every entry, as kv-starved-fleet has"
            )
        actions = self.scenario.actions
        self.num_replicas = width = self.scenario.max_replicas
        own = scenario_actions(width, hold=actions.hold, reject=actions.reject)
        self.max_waiting = settings.max_waiting
        self.max_running = max(t.max_num_seqs for t in types)
        rows = (self.max_waiting + self.max_running, NUM_ORDERING_FEATURES)
        self.num_dispatch, self.num_picks = len(own), rows[0] + settings.allow_none
        shown = REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]
        self._allocate(
            self.num_dispatch + self.num_picks,
            {
                "replicas": Table(shown, (width, len(shown))),
                "request": Table(
                    REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES],
                    (NUM_OBSERVED_REQUEST_FEATURES,),
                ),
                "requests": Table(ORDERING_FEATURES, rows),
                "engine": Table(ENGINE_FEATURES, (len(ENGINE_FEATURES),)),
            },
            {"kind": spaces.MultiBinary(NUM_KINDS), "agent": spaces.MultiBinary(1 + width)},
        )
        self._asks = Asks(
            admit=ALWAYS if settings.allow_none else WHERE_IT_MATTERS, preempt=WHERE_IT_MATTERS
        )
        self._kernel_settings = KernelSettings(
            needs=int(Group.COUNTERS | Group.METRICS | Group.PREFIX),
            by_arrival=settings.queue_order == "arrival",
            goodput=self.objective == "goodput",
            by_replica=by_replica,
            scale=float(self.reward_scale),
            width=self.max_waiting,
        )
        self.replicas: Float32Array = np.zeros((num_envs, width, len(shown)), np.float32)
        self.request: Float32Array = np.zeros((num_envs, NUM_OBSERVED_REQUEST_FEATURES), np.float32)
        self.requests: Float32Array = np.zeros((num_envs, *rows), np.float32)
        self.engine: Float32Array = np.zeros((num_envs, len(ENGINE_FEATURES)), np.float32)
        self.kind: Int8Array = np.zeros(num_envs, np.int8)
        self.agent: IntArray = np.zeros(num_envs, np.int64)
        self.of_replica: FloatArray = np.zeros((num_envs, width))
        self._kinds, self._agents = (
            np.eye(NUM_KINDS, dtype=np.int8),
            np.eye(1 + width, dtype=np.int8),
        )
        self._own_memory = self._memory()
        self._output = Output(
            self.replicas,
            self.request,
            self.requests,
            self.engine,
            self.kind,
            self.agent,
            np.zeros((num_envs, self.num_dispatch), np.int8),
            self.mask,
            np.zeros((num_envs, rows[0]), np.int64),
            np.zeros(num_envs),
            self.reward,
            self.of_replica,
            np.zeros((num_envs, 0), np.bool_),
            np.zeros(num_envs, np.int64),
            np.zeros(num_envs, np.bool_),
            self.done,
            self.dt_s,
        )

    @override
    def _make_simulator(self, episodes: list[Episode]) -> Simulator:
        return Simulator(
            self.scenario.spec, episodes, max_replicas=self.num_replicas, asks=self._asks
        )

    @override
    def _begin(self, env: int, episode: Episode) -> bool:
        self.simulator.load(env, episode)
        p, s = self.simulator.params, self.simulator.state
        known = self._output.counted
        if known.shape[1] < s.request.shape[1]:  # the simulator has grown
            grown = np.zeros((self.num_envs, s.request.shape[1]), np.bool_)
            grown[:, : known.shape[1]] = known
            self._output = self._output._replace(counted=grown)
        return begin(p, s, self._kernel_settings, self._output, env, self._memory())

    @override
    def _no_decision(self, drawn: bool) -> str:
        return "an episode needs at least one decision"

    def _memory(self) -> Memory:
        """Make working memory for one thread."""
        return Memory(
            np.empty(NUM_REQUEST_FEATURES),
            np.empty(NUM_ORDERING_FEATURES),
            np.empty(self.max_waiting),
        )

    @override
    def _step_range(self, first: int, stop: int, actions: IntArray, active: BoolArray) -> None:
        p, s = self.simulator.params, self.simulator.state
        c, o = self._kernel_settings, self._output
        arguments = (p, s, c, o, first, stop, actions, active, self._memory())
        fixed(step_range, *arguments)(*arguments)

    @override
    def _parts(self) -> dict[str, NDArray[Any]]:
        return {
            "replicas": self.replicas,
            "request": self.request,
            "requests": self.requests,
            "engine": self.engine,
            "kind": self._kinds[self.kind],
            "agent": self._agents[self.agent],
            "action_mask": self.mask,
        }

    @override
    def _rule_action(self, env: int) -> int:
        """Least outstanding requests; inside an engine first come, first served."""
        if self.kind[env] == KIND_DISPATCH:
            outstanding = self.replicas[env, :, OUTSTANDING_REQUESTS]
            load = np.where(self.mask[env, : self.num_replicas] == 1, outstanding, np.inf)
            best = int(load.argmin())
            return best if load[best] < np.inf else int(self.mask[env].argmax())
        picks = self.mask[env, self.num_dispatch :][: self._output.ids.shape[1]]
        rows = np.flatnonzero(picks)
        order = self._output.ids[env, rows]
        preempts = self.kind[env] == KIND_PREEMPT
        return self.num_dispatch + int(rows[order.argmax() if preempts else order.argmin()])

    def stand_in(self, env: int) -> int:
        """Return what the rule of the warm-up does in one environment."""
        return self._rule_action(env)

    def views(self) -> Views:
        """Make arrays for `look`."""
        width, (rows, columns) = self.num_replicas, self.requests.shape[1:]
        return Views(
            np.zeros(self.replicas.shape[1:], np.float32),
            np.zeros(NUM_OBSERVED_REQUEST_FEATURES, np.float32),
            np.zeros((width, rows, columns), np.float32),
            np.zeros((width, len(ENGINE_FEATURES)), np.float32),
            np.zeros(rows, np.int64),
        )

    def look(self, env: int, first: int, stop: int, views: Views) -> None:
        """Write what agents `first..stop-1` of an environment see now, whoever is asked."""
        p, s = self.simulator.params, self.simulator.state
        arguments = (p, s, self._kernel_settings, views, env, first, stop, self._own_memory)
        fixed(look, *arguments)(*arguments)

    @override
    def summary(self, env: int) -> tuple[float, ...]:
        """Latencies, goodput and preemptions of an episode that has ended."""
        victims = self.simulator.state.request["num_preemptions"][env]
        return (*super().summary(env), float(victims.sum()))

    @override
    def _deed(self, env: int, action: int) -> str:
        if self.kind[env] == KIND_DISPATCH:
            return dispatch_deed(self.simulator, env, action, self.num_replicas)
        deed = pick_deed(self.simulator, env, self._output.ids[env], action - self.num_dispatch)
        return f"replica {self.agent[env] - 1} {deed}"

    @override
    def scene(self, env: int) -> Scene:
        """Show the replicas, what they run and what waits for them."""
        return cluster_scene(self.scenario, self.simulator, env)
