"""A batch of cluster episodes: where requests go, and what becomes of them there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from typing_extensions import override

from servegym.cluster.entry import ANSWER_MOVE, SEE_MOVES, SEE_TIERS, SEE_TURN
from servegym.cluster.jit import fixed
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import ALWAYS, KEEP, LEAVE, OFFLOAD, WHERE_IT_MATTERS, Asks
from servegym.envs.cluster_kernels import (
    KIND_ADMIT,
    KIND_DISPATCH,
    KIND_MIGRATE,
    KIND_PLACE,
    KIND_PREEMPT,
    KIND_RETAIN,
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
    retain_deed,
)
from servegym.envs.retention_kernels import (
    TIER_FEATURES,
    Turns,
    num_answers,
    num_sums,
    turn_features,
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
from servegym.policy.run_kept import check_retention
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class ClusterBatch(RequestBatch):
    """`num_envs` fleets of engines that ask a dispatcher and their schedulers; see `RequestBatch`.

    Actions are those of a dispatch, then the rows of requests, then, if allowed, nobody. What is
    observed is what the agent that is asked sees; the other arrays are 0. In a fleet in which some
    replicas only prefill or decode there are no schedulers: the dispatcher is also asked where a
    request decodes, and has only the actions of a dispatch. Where requests migrate there is a
    controller, whose actions are the last. There are schedulers if all engines have orders, and
    where it is decided what becomes of the KV of ended turns; the actions for that are behind the
    others of a scheduler.

    Args:
        num_envs: Environments.
        settings: What it was told.
        by_replica: Whether `of_replica` is kept up to date.

    Attributes:
        num_replicas: Replica rows, R; fleets may be smaller.
        num_schedulers: R, or 0 where engines ask nobody.
        num_dispatch: Actions of a dispatch.
        num_picks: Actions of a scheduler that pick a request.
        num_answers: Those that say what becomes of the KV of a turn, 0 where nobody is asked.
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
        turn: Observation, `float32[num_envs, T]`, if it is asked what becomes of turns.
        tiers: Observation, `float32[num_envs, len(TIER_FEATURES)]`, if it is.
        kind: What is asked, 0 to dispatch, 1 to admit, 2 to preempt, 3 to place, 4 to migrate, 5 to
            retain, `int8[num_envs]`; observed as one number for each kind that there is.
        agent: Who is asked, 0 the dispatcher, 1 + r the scheduler of replica r, behind all of them
            the controller, `int64[num_envs]`; observed as one number an agent.
        of_replica: The part of the last reward that each replica's own requests are, before
            shaping and penalties, `float64[num_envs, R]`.
        kernel_settings: What kernels are told.
        own_memory: Working memory of the thread that made it.
    """

    metric_names: ClassVar[tuple[str, ...]] = (*RequestBatch.metric_names, "num_preemptions")
    settings_type = ClusterSettings
    settings: ClusterSettings

    def __init__(
        self, num_envs: int, settings: ClusterSettings, *, by_replica: bool = False
    ) -> None:
        super().__init__(num_envs, settings)
        spec = self.scenario.spec
        types = spec.types
        self._places, self._moves = spec.disaggregated, spec.migrates
        self._orders = {t.engine for t in types} == {"vllm-priority"}
        self._retains = _retains(settings, spec)
        something = self._places or self._moves or self._orders or self._retains
        if self.scenario.max_replicas < 2 or not something:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of two replicas or more with "
                "engine: vllm-priority in every entry, as kv-starved-fleet has, or with some whose "
                "role is prefill or decode, as pd-equal has, or with migration, as near-full-kv "
                "has, or with tiers of KV, as agents-tiers has; or give retention=True"
            )
        if not self._orders:
            _refuse(settings, ("max_waiting", "queue_order", "allow_none"), _NO_ORDERS)
        if not self._retains:
            _refuse(settings, ("keep_s",), _NO_RETENTION)
        actions = self.scenario.actions
        self.num_replicas = width = self.scenario.max_replicas
        own = scenario_actions(width, hold=actions.hold, reject=actions.reject)
        self.num_schedulers = width if self._orders or self._retains else 0
        self.max_waiting = settings.max_waiting if self._orders else 0
        self.max_running = max(t.max_num_seqs for t in types) if self._orders else 0
        rows = (self.max_waiting + self.max_running, NUM_ORDERING_FEATURES)
        self.num_dispatch, self.num_picks = len(own), rows[0] + settings.allow_none
        keep_s = tuple(map(float, settings.keep_s)) if self._retains else ()
        self.num_answers = num_answers(keep_s) if self._retains else 0
        self.num_moves = num_pairs(width) if self._moves else 0
        self.shown = REPLICA_FEATURES[:NUM_OBSERVED_FEATURES]
        kinds = [KIND_DISPATCH]
        kinds += [KIND_ADMIT, KIND_PREEMPT] * self._orders + [KIND_PLACE] * self._places
        kinds += [KIND_MIGRATE] * self._moves + [KIND_RETAIN] * self._retains
        self._kinds = np.eye(NUM_KINDS, dtype=np.int8)[:, kinds]
        self._asks = Asks(place=WHERE_IT_MATTERS, migrate=WHERE_IT_MATTERS)
        if self._orders:
            admit = ALWAYS if settings.allow_none else WHERE_IT_MATTERS
            self._asks = self._asks._replace(admit=admit, preempt=WHERE_IT_MATTERS)
        if self._retains:
            self._asks = self._asks._replace(retain=WHERE_IT_MATTERS)
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
        self.turn_features = turn_features(keep_s) if self._retains else ()
        self.tier_features = TIER_FEATURES if self._retains else ()
        if self._retains:
            tables["turn"] = Table(self.turn_features, (len(self.turn_features),))
            tables["tiers"] = Table(TIER_FEATURES, (len(TIER_FEATURES),))
        num_agents = 1 + self.num_schedulers + self._moves
        if num_agents > 1:
            others["agent"] = spaces.MultiBinary(num_agents)
        self.controller = num_agents - 1 if self._moves else -1
        self.num_scheduled = self.num_picks + self.num_answers
        self.first_move = self.num_dispatch + self.num_scheduled
        self._allocate(self.first_move + self.num_moves, tables, others)
        self.kernel_settings = KernelSettings(
            needs=int(groups),
            by_arrival=settings.queue_order == "arrival",
            goodput=self.objective == "goodput",
            by_replica=by_replica,
            scale=float(self.reward_scale),
            width=self.max_waiting,
            num_roles=NUM_ROLE_FEATURES if self._places else 0,
            controller=self.controller,
            first_answer=self.num_dispatch + self.num_picks,
        )
        self.replicas: Float32Array = np.zeros((num_envs, width, len(self.shown)), np.float32)
        self.request: Float32Array = np.zeros((num_envs, NUM_OBSERVED_REQUEST_FEATURES), np.float32)
        self.requests: Float32Array = np.zeros((num_envs, *rows), np.float32)
        self.engine: Float32Array = np.zeros((num_envs, len(ENGINE_FEATURES)), np.float32)
        self.moves: Float32Array = np.zeros(
            (num_envs, width if self._moves else 0, len(MOVE_FEATURES)), np.float32
        )
        self.turn: Float32Array = np.zeros((num_envs, len(self.turn_features)), np.float32)
        self.tiers: Float32Array = np.zeros((num_envs, len(self.tier_features)), np.float32)
        self.kind: Int8Array = np.zeros(num_envs, np.int8)
        self.agent: IntArray = np.zeros(num_envs, np.int64)
        self.of_replica: FloatArray = np.zeros((num_envs, width))
        self._agents = np.eye(num_agents, dtype=np.int8)
        self.own_memory = self._memory()
        self._output = Output(
            self.replicas,
            self.request,
            self.requests,
            self.engine,
            self.kind,
            self.moves,
            self.turn,
            self.tiers,
            _no_turns(num_envs, keep_s),
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
        if self._retains:
            simulator.require(SEE_TURN)
            simulator.require(SEE_TIERS)
        return simulator

    @override
    def _begin(self, env: int, episode: Episode) -> bool:
        self.simulator.load(env, episode)
        p, s = self.simulator.params, self.simulator.state
        known = self._output.counted
        if known.shape[1] < s.request.shape[1]:  # the simulator has grown
            grown = _grown(known, s.request.shape[1])
            self._output = self._output._replace(counted=grown)
        if self._retains:
            self._tell_tools(env, episode)
        return begin(p, s, self.kernel_settings, self._output, env, self._memory())

    def _tell_tools(self, env: int, episode: Episode) -> None:
        """Note which tool runs before each request of an episode; make room for more of them."""
        turns, tool = self._output.turns, 1 + episode.table.tool.astype(np.int64)
        size = self.simulator.state.request.shape[1]
        if turns.tool.shape[1] < size or turns.gaps.shape[1] <= tool.max():
            tools = max(turns.gaps.shape[1], 1 + int(tool.max()))
            turns = turns._replace(
                tool=_grown(turns.tool, size),
                number=_grown(turns.number, size),
                first=_grown(turns.first, size),
                awaited=_grown(turns.awaited, size),
                gaps=_grown(turns.gaps, tools),
            )
            self._output = self._output._replace(turns=turns)
        turns.tool[env, : len(tool)] = tool

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
        c, o = self.kernel_settings, self._output
        arguments = (p, s, c, o, first, stop, actions, active, self._memory())
        fixed(step_range, *arguments)(*arguments)

    @override
    def _parts(self) -> dict[str, NDArray[Any]]:
        parts: dict[str, NDArray[Any]] = {"replicas": self.replicas, "request": self.request}
        if self._orders:
            parts |= {"requests": self.requests, "engine": self.engine}
        if self._moves:
            parts["moves"] = self.moves
        if self._retains:
            parts |= {"turn": self.turn, "tiers": self.tiers}
        parts["kind"] = self._kinds[self.kind]
        if self._agents.shape[0] > 1:
            parts["agent"] = self._agents[self.agent]
        return {**parts, "action_mask": self.mask}

    @override
    def _rule_action(self, env: int) -> int:
        """Least outstanding requests; first come, first served; the scenario's rules for KV."""
        if self.kind[env] == KIND_MIGRATE:
            p, s = self.simulator.params, self.simulator.state
            return self.first_move + rule_pair(p, s, env, self.num_replicas)
        if self.kind[env] == KIND_RETAIN:
            return self.first_answer + self._usual_answer(env)
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
    def first_answer(self) -> int:
        """Actions before those that say what becomes of the KV of a turn."""
        return self.num_dispatch + self.num_picks

    def _usual_answer(self, env: int) -> int:
        """What becomes of a turn where nobody is asked, as far as one answer can say it."""
        usual_s = self.scenario.spec.retain_kv_s
        if usual_s > 0:
            return KEEP + int(np.abs(self._output.turns.keep_s - usual_s).argmin())
        return OFFLOAD if self.mask[env, self.first_answer + OFFLOAD] else LEAVE

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
            np.zeros(len(self.turn_features), np.float32),
            np.zeros((width if self._retains else 0, len(TIER_FEATURES)), np.float32),
            np.zeros(rows, np.int64),
        )

    def look(self, env: int, first: int, stop: int, views: Views) -> None:
        """Write what agents `first..stop-1` of an environment see now, whoever is asked."""
        p, s = self.simulator.params, self.simulator.state
        c, turns = self.kernel_settings, self._output.turns
        arguments = (p, s, c, turns, views, env, first, stop, self.own_memory)
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
        if self.kind[env] == KIND_RETAIN:
            times_s = self._output.turns.keep_s
            return retain_deed(self.simulator, env, action - self.first_answer, times_s)
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


#: What settings are about that mean nothing in some scenarios.
_NO_ORDERS = "the schedulers of engines with orders, and here there are none: leave it out"
_NO_RETENTION = (
    "what becomes of the KV of ended turns, and here nobody is asked: leave it out, or give "
    "retention=True"
)


def _refuse(settings: ClusterSettings, names: tuple[str, ...], about: str) -> None:
    """Refuse what is said about what a scenario does not have."""
    defaults = {field.name: field.default for field in fields(settings)}
    for name in names:
        if getattr(settings, name) != defaults[name]:
            raise ConfigError(f"{name} is about {about}")


def _retains(settings: ClusterSettings, spec: ClusterSpec) -> bool:
    """Whether it is asked what becomes of the KV of ended turns."""
    if settings.retention is None:
        return spec.tiered and not spec.moves_kv
    if settings.retention:
        check_retention(spec, "retention=True", "leave it out")
    return settings.retention


def _no_turns(num_envs: int, keep_s: tuple[float, ...]) -> Turns:
    """Make what is noted of turns, before there are any."""
    tool, number, first, awaited = (np.zeros((num_envs, 0), np.int64) for _ in range(4))
    return Turns(
        np.array(keep_s),
        tool,
        number,
        first,
        awaited,
        np.zeros(num_envs, np.int64),
        np.zeros((num_envs, 0, num_sums(keep_s))),
    )


def _grown(array: NDArray[Any], size: int) -> NDArray[Any]:
    """Return an array with a longer second axis, which is 0 where it is new."""
    grown = np.zeros((array.shape[0], size, *array.shape[2:]), array.dtype)
    grown[:, : array.shape[1]] = array
    return grown
