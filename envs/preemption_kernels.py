"""Stepping a batch of preemption environments in one compiled call."""

from __future__ import annotations

from typing import NamedTuple

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.state import (
    ADMIT,
    ALWAYS,
    DECISION,
    NOBODY,
    Params,
    State,
)
from servegym.envs.kernels import waited
from servegym.policy.ordering_rows import write_engine_columns, write_row
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray


class KernelSettings(NamedTuple):
    """What is shown and rewarded.

    Attributes:
        by_arrival: Whether a long queue is cut by arrival, else by predicted tokens left.
        goodput: Whether requests in time are rewarded, else times in the system are.
        scale: Divides rewards.
        width: Rows for waiting requests; the running ones follow.
    """

    by_arrival: bool
    goodput: bool
    scale: float
    width: int


class Output(NamedTuple):
    """What environments give; axes: E environments, M rows, A actions."""

    requests: Float32Array  # [E, M, NUM_ORDERING_FEATURES]
    engine: Float32Array  # [E, number of the engine's features]
    kind: Int8Array  # [E] 0 to admit, 1 to preempt
    mask: Int8Array  # [E, A]
    ids: IntArray  # [E, M] request of each row
    earned: FloatArray  # [E] reward times scale so far
    reward: FloatArray  # [E]
    done: BoolArray  # [E]
    dt_s: FloatArray  # [E] simulated seconds since the last choice


@inlined
def _shortlist(
    s: State, by_arrival: bool, width: int, e: int, r: int, chosen: IntArray, key: FloatArray
) -> int:
    """Write the first waiting requests, in order; return how many there are."""
    count = 0
    request = s.replica[e, r].wait_head
    while request >= 0:
        q = s.request[e, request]
        mine = q.arrival_s if by_arrival else max(q.predicted - q.generated, 1.0)
        place = count
        while place > 0 and (
            key[place - 1] > mine or (key[place - 1] == mine and chosen[place - 1] > request)
        ):
            place -= 1
        if place < width:
            count = min(count + 1, width)
            for i in range(count - 1, place, -1):
                key[i], chosen[i] = key[i - 1], chosen[i - 1]
            key[place], chosen[place] = mine, request
        request = q.next_request
    return count


@inlined
def _copy(source: FloatArray, target: Float32Array) -> None:
    # an assignment of slices would need Numba's runtime
    for i in range(target.shape[0]):
        target[i] = source[i]


@inlined
def write_engine(
    p: Params,
    s: State,
    by_arrival: bool,
    width: int,
    e: int,
    r: int,
    requests: Float32Array,
    engine: Float32Array,
    ids: IntArray,
    row: FloatArray,
    key: FloatArray,
) -> int:
    """Write what an engine sees of itself: waiting requests, from row `width` on running ones.

    Args:
        p: Constants.
        s: State.
        by_arrival: Whether a long queue is cut by arrival, else by predicted tokens left.
        width: Rows for waiting requests.
        e: Environment.
        r: Replica.
        requests: `float32[M, NUM_ORDERING_FEATURES]`, rows of absent requests become 0.
        engine: Its own features.
        ids: Request of each row, `int64[M]`.
        row: Working memory, `float64[NUM_ORDERING_FEATURES]`.
        key: Working memory, `float64[width]`.

    Returns:
        How many waiting requests have a row.
    """
    for i in range(requests.shape[0]):
        for f in range(requests.shape[1]):
            requests[i, f] = 0.0
    count = _shortlist(s, by_arrival, width, e, r, ids, key)
    for i in range(count):
        write_row(p, s, e, r, ids[i], False, row)
        _copy(row, requests[i])
    place = width
    request = s.replica[e, r].run_head
    while request >= 0:
        write_row(p, s, e, r, request, True, row)
        _copy(row, requests[place])
        ids[place] = request
        place += 1
        request = s.request[e, request].next_request
    write_engine_columns(p, s, e, r, row)
    _copy(row[row.shape[0] - engine.shape[0] :], engine)
    return count


@inlined
def allow_picks(
    p: Params, s: State, e: int, first: int, width: int, count: int, nobody: int, mask: Int8Array
) -> None:
    """Allow the picks of the choice that is due, in a mask that is 0.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        first: Place of row 0 in the mask.
        width: Rows for waiting requests.
        count: How many of them are taken.
        nobody: Place of nobody in the mask, behind the rows.
        mask: `int8[A]`, written to.
    """
    v = s.replica[e, s.env[e].asking]
    admit = s.env[e].decision == ADMIT
    start = first if admit else first + width
    for i in range(start, start + (count if admit else v.num_running)):
        mask[i] = 1
    if p.asks.admit == ALWAYS and admit and v.num_running > 0:
        mask[nobody] = 1


@kernel
def _write_choice(
    p: Params, s: State, c: KernelSettings, o: Output, e: int, row: FloatArray, key: FloatArray
) -> None:
    """Write the observation of one pending choice."""
    r = s.env[e].asking
    count = write_engine(
        p, s, c.by_arrival, c.width, e, r, o.requests[e], o.engine[e], o.ids[e], row, key
    )
    o.mask[e] = 0
    allow_picks(p, s, e, 0, c.width, count, o.requests.shape[1], o.mask[e])
    o.kind[e] = 0 if s.env[e].decision == ADMIT else 1


@kernel
def begin(
    p: Params, s: State, c: KernelSettings, o: Output, e: int, row: FloatArray, key: FloatArray
) -> bool:
    """Run a new episode to its first choice and observe it; return False if it has none.

    Args:
        p: Constants.
        s: State.
        c: Settings.
        o: Written to.
        e: Environment.
        row: Working memory, `float64[NUM_ORDERING_FEATURES]`.
        key: Working memory, `float64[width]`.
    """
    if advance(p, s, e) != DECISION:
        return False
    _write_choice(p, s, c, o, e, row, key)
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
    row: FloatArray,
    key: FloatArray,
) -> None:
    """Pick, go on, reward and observe in environments `first..stop-1` that are active."""
    for e in range(first, stop):
        if not active[e]:
            continue
        before_s = s.env[e].now_s
        picked = NOBODY if actions[e] == o.requests.shape[1] else o.ids[e, actions[e]]
        apply(p, s, e, picked)
        more = advance(p, s, e) == DECISION
        o.dt_s[e] = s.env[e].now_s - before_s
        sofar = s.env[e].good if c.goodput else -waited(s, e)
        o.reward[e] = (sofar - o.earned[e]) / c.scale
        o.earned[e] = sofar
        o.done[e] = not more
        if more:
            _write_choice(p, s, c, o, e, row, key)
        else:
            o.requests[e] = 0.0
            o.engine[e] = 0.0
            o.kind[e] = 0
            o.mask[e] = 0
            o.mask[e, 0] = 1  # a mask without any action breaks samplers
