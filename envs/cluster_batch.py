"""A batch of cluster episodes: where requests go, and what becomes of them there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from typing_extensions import override

from servegym.cluster.entry import ANSWER_MOVE, SEE_MOVES
from servegym.cluster.jit import fixed
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.cluster.state import ALWAYS, WHERE_IT_MATTERS, Asks
from servegym.envs.cluster_kernels import (
    KIND_ADMIT,
    KIND_DISPATCH,
    KIND_MIGRATE,
    KIND_PLACE,
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
from servegym.envs.migration_kernels import MOVE_FEATURES, num_pairs, rule_pair, see_moves
from servegym.envs.observation import Table
from servegym.envs.preemption_batch import ENGINE_FEATURES
from servegym.envs.request_batch import RequestBatch
from servegym.envs.request_scene import (
    cluster_scene,
    dispatch_deed,
    move_deed,
    pick_deed,
    place_deed,
)
from servegym.envs.scene import Scene
from servegym.envs.settings import ClusterSettings
from servegym.errors import ConfigError
from servegym.policy.contract import (
    FIRST_ROLE,
    NUM_OBSERVED_FEATURES,
    NUM_OBSERVED_REQUEST_FEATURES,
    NUM_REQUEST_FEATURES,
    NUM_ROLE_FEATURES,
    OUTSTANDING_REQUESTS,
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
)
from servegym.policy.layout import scenario_actions
from servegym.policy.observe import prepare
from servegym.policy.ordering import NUM_ORDERING_FEATURES, ORDERING_FEATURES
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class ClusterBatch(RequestBatch):
    """`num_envs` fleets of engines that ask a dispatcher and their schedulers; see `RequestBatch`.

    Actions are those of a dispatch, then the rows of requests, then, if allowed, nobody. What is
    observed is what the agent that is asked sees; the other arrays are 0. In a fleet in which some
    replicas only prefill or decode there are no schedulers: the dispatcher is also asked where a
    request decodes, and has only the actions of a dispatch. Where requests migrate there is a
    controller, whose actions are the last; there are schedulers if all engines have orders.

    Args:
        num_envs: Environments.
        settings: What it was told.
        by_replica: Whether `of_replica` is kept up to date.

    Attributes:
        num_replicas: Replica rows, R; fleets may be smaller.
        num_schedulers: R, or 0 where engines have no orders.
        num_dispatch: Actions of a dispatch.
        num_picks: Actions of a scheduler.
        num_moves: Actions of a controller, 0 without one.
        max_waiting: Rows for waiting requests.
        max_running: Rows for running requests: the largest `max_num_seqs`.
        shown: Features of a replica: the plain ones, and those about roles where requests are
            placed.
        replicas: Observation, `float32[num_envs, R, len(shown)]`.
        request: Observation, `float32[num_envs, NUM_OBSERVED_REQUEST_FEATURES]`.
        requests: Observation, `float32[num_envs, max_waiting + max_running, 17]`.
        engine: Observation, `float32[num_envs, 5]`.
        moves: Observation, `float32[num_envs, R, len(MOVE_FEATURES)]`, if there is a controller.
        kind: What is asked, 0 to dispatch, 1 to admit, 2 to preempt, 3 to place, 4 to migrate,
            `int8[num_envs]`; observed as one number for each kind that there is.
        agent: Who is asked, 0 the dispatcher, 1 + r the scheduler of replica r, behind all of them
            the controller, `int64[num_envs]`; observed as one number an agent.
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
        self._places = self.scenario.spec.disaggregated
        self._moves = self.scenario.spec.migrates
        self._orders = {t.engine for t in types} == {"vllm-priority"}
        if self.scenario.max_replicas < 2 or not (self._places or self._moves or self._orders):
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of two replicas or more with "
                "engine: vllm-priority in every entry, as kv-starved-fleet has, or with some whose "
                "role is prefill or decode, as pd-equal has, or with migration, as near-full-kv has"
            )
        if not self._orders:
            _refuse_order_settings(settings)
        actions = self.scenario.actions
        self.num_replicas = width = self.scenario.max_replicas
        own = scenario_actions(width, hold=actions.hold, reject=actions.reject)
        self.num_schedulers = width if self._orders else 0
        self.max_waiting = settings.max_waiting if self._orders else 0
        self.max_running = max(t.max_num_seqs for t in types) if self._orders else 0
        rows = (self.max_waiting + self.max_running, NUM_ORDERING_FEATURES)
        self.num_dispatch, self.num_picks = len(own), rows[0] + settings.allow_none
        self.num_moves = num_pairs(width) if self._moves else 0
        self.shown = REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]
        kinds = [KIND_DISPATCH]
        kinds += [KIND_ADMIT, KIND_PREEMPT] * self._orders + [KIND_PLACE] * self._places
        kinds += [KIND_MIGRATE] * self._moves
        self._kinds = np.eye(NUM_KINDS, dtype=np.int8)[:, kinds]
        self._asks = Asks(place=WHERE_IT_MATTERS, migrate=WHERE_IT_MATTERS)
        if self._orders:
            admit = ALWAYS if settings.allow_none else WHERE_IT_MATTERS
            self._asks = self._asks._replace(admit=admit, preempt=WHERE_IT_MATTERS)
        groups = Group.COUNTERS | Group.METRICS | Group.PREFIX
        if self._places:
            self.shown += REPLICA_FEATURES[FIRST_ROLE:]
            groups |= Group.ROLES
        self._groups = groups
        tables = {
            "replicas": Table(self.shown, (width, len(self.shown))),
            "request": Table(
                REQUEST_FEATURES[:NUM_OBSERVED_REQUEST_FEATURES], (NUM_OBSERVED_REQUEST_FEATURES,)
            ),
        }
        others: dict[str, spaces.Space[Any]] = {
            "kind": spaces.MultiBinary(self._kinds.shape[1]),
        }
        if self._orders:
            tables["requests"] = Table(ORDERING_FEATURES, rows)
            tables["engine"] = Table(ENGINE_FEATURES, (len(ENGINE_FEATURES),))
        if self._moves:
            tables["moves"] = Table(MOVE_FEATURES, (width, len(MOVE_FEATURES)))
        num_agents = 1 + self.num_schedulers + self._moves
        if num_agents > 1:
            others["agent"] = spaces.MultiBinary(num_agents)
        self.controller = num_agents - 1 if self._moves else -1
        self._allocate(self.num_dispatch + self.num_picks + self.num_moves, tables, others)
        self._kernel_settings = KernelSettings(
            needs=int(groups),
            by_arrival=settings.queue_order == "arrival",
            goodput=self.objective == "goodput",
            by_replica=by_replica,
            scale=float(self.reward_scale),
            width=self.max_waiting,
            num_roles=NUM_ROLE_FEATURES if self._places else 0,
            controller=self.controller,
        )
        self.replicas: Float32Array = np.zeros((num_envs, width, len(self.shown)), np.float32)
        self.request: Float32Array = np.zeros((num_envs, NUM_OBSERVED_REQUEST_FEATURES), np.float32)
        self.requests: Float32Array = np.zeros((num_envs, *rows), np.float32)
        self.engine: Float32Array = np.zeros((num_envs, len(ENGINE_FEATURES)), np.float32)
        self.moves: Float32Array = np.zeros(
            (num_envs, width if self._moves else 0, len(MOVE_FEATURES)), np.float32
        )
        self.kind: Int8Array = np.zeros(num_envs, np.int8)
        self.agent: IntArray = np.zeros(num_envs, np.int64)
        self.of_replica: FloatArray = np.zeros((num_envs, width))
        self._agents = np.eye(num_agents, dtype=np.int8)
        self._own_memory = self._memory()
        self._output = Output(
            self.replicas,
            self.request,
            self.requests,
            self.engine,
            self.kind,
            self.moves,
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
        simulator = Simulator(
            self.scenario.spec, episodes, max_replicas=self.num_replicas, asks=self._asks
        )
        prepare(simulator, self._groups)
        if self._moves:
            simulator.require(SEE_MOVES)
            simulator.require(ANSWER_MOVE)
        return simulator

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
        parts: dict[str, NDArray[Any]] = {"replicas": self.replicas, "request": self.request}
        if self._orders:
            parts |= {"requests": self.requests, "engine": self.engine}
        if self._moves:
            parts["moves"] = self.moves
        parts["kind"] = self._kinds[self.kind]
        if self._orders or self._moves:
            parts["agent"] = self._agents[self.agent]
        return {**parts, "action_mask": self.mask}

    @override
    def _rule_action(self, env: int) -> int:
        """Least outstanding requests; first come, first served; the scenario's rule moves."""
        if self.kind[env] == KIND_MIGRATE:
            p, s = self.simulator.params, self.simulator.state
            return self.first_move + rule_pair(p, s, env, self.num_replicas)
        if self.is_dispatchers(env):
            outstanding = self.replicas[env, :, OUTSTANDING_REQUESTS]
            load = np.where(self.mask[env, : self.num_replicas] == 1, outstanding, np.inf)
            best = int(load.argmin())
            return best if load[best] < np.inf else int(self.mask[env].argmax())
        picks = self.mask[env, self.num_dispatch :][: self._output.ids.shape[1]]
        rows = np.flatnonzero(picks)
        order = self._output.ids[env, rows]
        preempts = self.kind[env] == KIND_PREEMPT
        return self.num_dispatch + int(rows[order.argmax() if preempts else order.argmin()])

    @property
    def first_move(self) -> int:
        """Actions before those of the controller."""
        return self.num_dispatch + self.num_picks

    def is_dispatchers(self, env: int) -> bool:
        """Whether the dispatcher's actions are asked for in an environment."""
        return bool(self.kind[env] in (KIND_DISPATCH, KIND_PLACE))

    def stand_in(self, env: int) -> int:
        """Return what the rule of the warm-up does in one environment."""
        return self._rule_action(env)

    def views(self) -> Views:
        """Make arrays for `look`."""
        width, (rows, columns) = self.num_schedulers, self.requests.shape[1:]
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

    def look_at_moves(self, env: int) -> Float32Array:
        """Return what the controller of an environment sees now, `float32[R, F]`, a fresh array."""
        moves = np.zeros(self.moves.shape[1:], np.float32)
        p, s = self.simulator.params, self.simulator.state
        see_moves(p, s, env, moves, np.zeros(self.num_moves, np.int8), 0)
        return moves

    @override
    def summary(self, env: int) -> tuple[float, ...]:
        """Latencies, goodput and preemptions of an episode that has ended."""
        victims = self.simulator.state.request["num_preemptions"][env]
        return (*super().summary(env), float(victims.sum()))

    @override
    def _deed(self, env: int, action: int) -> str:
        if self.kind[env] == KIND_MIGRATE:
            return move_deed(action - self.first_move, self.num_replicas)
        if self.kind[env] == KIND_PLACE:
            return place_deed(self.simulator, env, action)
        if self.kind[env] == KIND_DISPATCH:
            return dispatch_deed(self.simulator, env, action, self.num_replicas)
        deed = pick_deed(self.simulator, env, self._output.ids[env], action - self.num_dispatch)
        return f"replica {self.agent[env] - 1} {deed}"

    @override
    def scene(self, env: int) -> Scene:
        """Show the replicas, what they run and what waits for them."""
        return cluster_scene(self.scenario, self.simulator, env)


def _refuse_order_settings(settings: ClusterSettings) -> None:
    """Refuse what is said about schedulers where there are none."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name in ("max_waiting", "queue_order", "allow_none"):
        if getattr(settings, name) != defaults[name]:
            raise ConfigError(
                f"{name} is about the schedulers of engines with orders, and here there are none: "
                "leave it out"
            )
