"""Stepping a batch of cluster environments in one compiled call."""

from __future__ import annotations

from typing import NamedTuple

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.state import (
    ADMIT,
    DECISION,
    DISPATCH,
    FINISHED,
    MIGRATE,
    NOBODY,
    PLACE,
    REJECTED,
    RETAIN,
    Params,
    State,
)
from servegym.envs.dispatch_kernels import core_action, write_observation, write_replicas
from servegym.envs.kernels import waited
from servegym.envs.migration_kernels import answer_move, see_moves
from servegym.envs.preemption_kernels import allow_picks, write_engine
from servegym.envs.retention_kernels import (
    Turns,
    allow_answers,
    begin_turns,
    core_retention,
    note_turn,
    see_tiers,
    write_turn,
)
from servegym.policy.contract import PREFIX_HIT_TOKENS, Group
from servegym.policy.observe import observe
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray
from servegym.workloads.table import BY_ITSELF

#: Kinds of decisions; the dispatcher dispatches and places, schedulers admit, preempt and retain,
#: the controller lets requests migrate.
KIND_DISPATCH, KIND_ADMIT, KIND_PREEMPT, KIND_PLACE, KIND_MIGRATE, KIND_RETAIN = range(6)
NUM_KINDS = 6

_PREFIX = int(Group.PREFIX)


class KernelSettings(NamedTuple):
    """What is shown and rewarded.

    Attributes:
        needs: Groups of features that are filled, a sum of `policy.contract.Group`.
        by_arrival: Whether a long queue is cut by arrival, else by predicted tokens left.
        goodput: Whether requests in time are rewarded, else times in the system are.
        by_replica: Whether `Output.of_replica` is filled.
        scale: Divides rewards.
        width: Rows for waiting requests; the running ones follow.
        num_roles: How many of a replica's features, the last, are those about roles.
        controller: Number of the agent that lets requests migrate.
        first_answer: First action that says what becomes of a turn's KV.
    """

    needs: int
    by_arrival: bool
    goodput: bool
    by_replica: bool
    scale: float
    width: int
    num_roles: int
    controller: int
    first_answer: int


class Output(NamedTuple):
    """What environments give.

    Axes: E environments, R replica rows, F features of a replica, M rows of requests, D dispatch
    actions, A all actions: those of a dispatch, rows, nobody where that is allowed, what becomes of
    a turn's KV, those of a controller. What the asked agent does not see is 0. Where engines have
    no orders M is 0.
    """

    replicas: Float32Array  # [E, R, F]: NUM_OBSERVED_FEATURES, and those about roles where needed
    request: Float32Array  # [E, NUM_OBSERVED_REQUEST_FEATURES]
    requests: Float32Array  # [E, M, NUM_ORDERING_FEATURES]
    engine: Float32Array  # [E, number of the engine's features]
    kind: Int8Array  # [E] KIND_*
    moves: Float32Array  # [E, R, len(MOVE_FEATURES)]; R is 0 where there is no controller
    turn: Float32Array  # [E, number of a turn's features]
    tiers: Float32Array  # [E, len(TIER_FEATURES)]
    turns: Turns
    agent: IntArray  # [E] who is asked: 0 the dispatcher, 1 + r the scheduler of replica r, ...
    mask: Int8Array  # [E, D] of the dispatch or placing that is due
    allowed: Int8Array  # [E, A]
    ids: IntArray  # [E, M] request of each row
    earned: FloatArray  # [E] reward times scale so far
    reward: FloatArray  # [E]
    of_replica: FloatArray  # [E, R] the part of it that its own requests are
    counted: BoolArray  # [E, N] requests whose end has been counted there; N of the simulator's
    oldest: IntArray  # [E] first request that is not among them
    in_order: BoolArray  # [E] whether requests arrive in the order of their numbers
    done: BoolArray  # [E]
    dt_s: FloatArray  # [E] simulated seconds since the last decision


class Memory(NamedTuple):
    """Working memory of one thread."""

    request: FloatArray  # [NUM_REQUEST_FEATURES]
    row: FloatArray  # [NUM_ORDERING_FEATURES]
    key: FloatArray  # [width]


class Views(NamedTuple):
    """What every agent of one environment sees, whoever is asked."""

    replicas: Float32Array  # [R, F], as in `Output`
    request: (
        Float32Array  # [NUM_OBSERVED_REQUEST_FEATURES], 0 where nothing is dispatched or placed
    )
    requests: Float32Array  # [R, M, NUM_ORDERING_FEATURES]
    engine: Float32Array  # [R, number of the engine's features]
    turn: Float32Array  # [number of a turn's features], 0 where no turn is asked about
    tiers: Float32Array  # [R, len(TIER_FEATURES)]; R is 0 where nobody is asked about turns
    ids: IntArray  # [M], working memory


@inlined
def _is_dispatchers(kind: int) -> bool:
    return kind in (KIND_DISPATCH, KIND_PLACE)


@inlined
def _num_pairs(o: Output) -> int:
    """Actions of the controller; they are the last."""
    return o.moves.shape[1] * o.moves.shape[1] + 1


@inlined
def _write_decision(p: Params, s: State, c: KernelSettings, o: Output, e: int, m: Memory) -> None:
    """Write the observation of one pending decision."""
    env = s.env[e]
    _write_nothing(o, e)
    if env.decision == DISPATCH or env.decision == PLACE:
        write_observation(p, s, c.needs, c.num_roles, e, o.replicas, o.request, o.mask, m.request)
        for a in range(o.mask.shape[1]):
            o.allowed[e, a] = o.mask[e, a]
        o.kind[e] = KIND_DISPATCH if env.decision == DISPATCH else KIND_PLACE
        o.agent[e] = 0
    elif env.decision == MIGRATE:
        see_moves(p, s, e, o.moves[e], o.allowed[e], o.allowed.shape[1] - _num_pairs(o))
        o.kind[e] = KIND_MIGRATE
        o.agent[e] = c.controller
    elif env.decision == RETAIN:
        note_turn(s, o.turns, e)
        write_turn(p, s, o.turns, e, o.turn[e])
        see_tiers(p, s, e, env.asking, o.tiers[e])
        allow_answers(p, s, e, c.first_answer, o.turns.keep_s.shape[0], o.allowed[e])
        o.kind[e] = KIND_RETAIN
        o.agent[e] = 1 + env.asking
    else:
        count = write_engine(
            p,
            s,
            c.by_arrival,
            c.width,
            e,
            env.asking,
            o.requests[e],
            o.engine[e],
            o.ids[e],
            m.row,
            m.key,
        )
        first = o.mask.shape[1]
        nobody = first + o.requests.shape[1]
        allow_picks(p, s, e, first, c.width, count, nobody, o.allowed[e])
        o.kind[e] = KIND_ADMIT if env.decision == ADMIT else KIND_PREEMPT
        o.agent[e] = 1 + env.asking


@inlined
def _write_nothing(o: Output, e: int) -> None:
    """Show nothing, and allow nothing."""
    if _is_dispatchers(o.kind[e]):
        o.replicas[e] = 0.0
        o.request[e] = 0.0
    elif o.kind[e] == KIND_MIGRATE:
        o.moves[e] = 0.0
    elif o.kind[e] == KIND_RETAIN:
        o.turn[e] = 0.0
        o.tiers[e] = 0.0
    else:
        o.requests[e] = 0.0
        o.engine[e] = 0.0
    o.allowed[e] = 0
    o.kind[e] = KIND_DISPATCH
    o.agent[e] = 0


@inlined
def _credit_replicas(
    p: Params, s: State, c: KernelSettings, o: Output, e: int, before_s: float
) -> None:
    """Split what was earned since `before_s` by the replicas whose requests earned it."""
    now_s = s.env[e].now_s
    for r in range(o.of_replica.shape[1]):
        o.of_replica[e, r] = 0.0
    stop = s.env[e].next_arrival if o.in_order[e] else s.env[e].num_requests
    for i in range(o.oldest[e], stop):
        q = s.request[e, i]
        if o.counted[e, i]:
            o.oldest[e] += o.oldest[e] == i
            continue
        ended = q.status == FINISHED
        o.counted[e, i] = ended or q.status == REJECTED
        if q.replica < 0:
            continue
        if not c.goodput:
            until_s = min(q.finish_s, now_s) if ended else now_s
            o.of_replica[e, q.replica] -= (until_s - max(q.dispatch_s, before_s)) / c.scale
        elif ended:
            tpot_s = 0.0
            if q.output > 1:
                tpot_s = (q.finish_s - q.first_token_s) / (q.output - 1)
            ttft_s = q.first_token_s - q.arrival_s
            if ttft_s <= p.slo_s[q.slo_class, 0] and tpot_s <= p.slo_s[q.slo_class, 1]:
                o.of_replica[e, q.replica] += p.slo_weight[q.slo_class] / c.scale


@kernel
def begin(p: Params, s: State, c: KernelSettings, o: Output, e: int, m: Memory) -> bool:
    """Run a new episode to its first decision and observe it; return False if it has none."""
    o.counted[e] = False
    o.oldest[e] = 0
    o.in_order[e] = True
    for i in range(s.env[e].num_requests):
        o.in_order[e] = o.in_order[e] and s.request[e, i].after == BY_ITSELF
    if o.turns.keep_s.shape[0] > 0:
        begin_turns(s, o.turns, e)
    if advance(p, s, e) != DECISION:
        return False
    _write_decision(p, s, c, o, e, m)
    o.earned[e] = 0.0
    return True


@kernel
def step_range(
    p: Params,
    s: State,
    c: KernelSettings,
    o: Output,
    first: int,
    stop: int,
    actions: IntArray,
    active: BoolArray,
    m: Memory,
) -> None:
    """Decide, go on, reward and observe in environments `first..stop-1` that are active."""
    width, num_rows = s.observation.shape[2], o.requests.shape[1]
    for e in range(first, stop):
        if not active[e]:
            continue
        before_s = s.env[e].now_s
        if _is_dispatchers(o.kind[e]):
            answer = core_action(p, width, actions[e])
        elif o.kind[e] == KIND_MIGRATE:
            pair = actions[e] - (o.allowed.shape[1] - _num_pairs(o))
            answer = answer_move(p, s, e, o.moves.shape[1], pair)
        elif o.kind[e] == KIND_RETAIN:
            answer = core_retention(s, o.turns, e, actions[e] - c.first_answer)
        else:
            row = actions[e] - o.mask.shape[1]
            answer = NOBODY if row == num_rows else o.ids[e, row]
        apply(p, s, e, answer)
        more = advance(p, s, e) == DECISION
        o.dt_s[e] = s.env[e].now_s - before_s
        sofar = s.env[e].good if c.goodput else -waited(s, e)
        o.reward[e] = (sofar - o.earned[e]) / c.scale
        o.earned[e] = sofar
        if c.by_replica:
            _credit_replicas(p, s, c, o, e, before_s)
        o.done[e] = not more
        if more:
            _write_decision(p, s, c, o, e, m)
        else:
            _write_nothing(o, e)
            o.allowed[e, 0] = 1  # a mask without any action breaks samplers


@inlined
def look_as_dispatcher(
    p: Params,
    s: State,
    c: KernelSettings,
    e: int,
    replicas: Float32Array,
    request: Float32Array,
    memory: FloatArray,
) -> None:
    """Write what the dispatcher sees now, as in `Views`, whoever is asked."""
    due = s.env[e].decision == DISPATCH or s.env[e].decision == PLACE
    observe(p, s, e, c.needs if due else c.needs & ~_PREFIX, memory)
    write_replicas(s, c.num_roles, e, replicas)
    if not due:
        for r in range(replicas.shape[0]):
            replicas[r, PREFIX_HIT_TOKENS] = 0.0
    for g in range(request.shape[0]):
        request[g] = memory[g] if due else 0.0


@kernel
def look(
    p: Params,
    s: State,
    c: KernelSettings,
    turns: Turns,
    v: Views,
    e: int,
    first: int,
    stop: int,
    m: Memory,
) -> None:
    """Write what agents `first..stop-1` see now, the dispatcher being 0."""
    v.turn[:] = 0.0
    for agent in range(first, stop):
        if agent == 0:
            look_as_dispatcher(p, s, c, e, v.replicas, v.request, m.request)
            continue
        r = agent - 1
        if v.requests.shape[1] > 0:
            write_engine(
                p,
                s,
                c.by_arrival,
                c.width,
                e,
                r,
                v.requests[r],
                v.engine[r],
                v.ids,
                m.row,
                m.key,
            )
        if v.tiers.shape[0] > 0:
            see_tiers(p, s, e, r, v.tiers[r])
            if s.env[e].decision == RETAIN and s.env[e].asking == r:
                write_turn(p, s, turns, e, v.turn)
