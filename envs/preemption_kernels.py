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
from servegym.policy.ordering_rows import write_row
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
    s: State, c: KernelSettings, e: int, r: int, chosen: IntArray, key: FloatArray
) -> int:
    """Write the first waiting requests, in order; return how many there are."""
    count = 0
    request = s.replica[e, r].wait_head
    while request >= 0:
        q = s.request[e, request]
        mine = q.arrival_s if c.by_arrival else max(q.predicted - q.generated, 1.0)
        place = count
        while place > 0 and (
            key[place - 1] > mine or (key[place - 1] == mine and chosen[place - 1] > request)
        ):
            place -= 1
        if place < c.width:
            count = min(count + 1, c.width)
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


@kernel
def _write_choice(
    p: Params, s: State, c: KernelSettings, o: Output, e: int, row: FloatArray, key: FloatArray
) -> None:
    """Write the observation of one pending choice."""
    r = s.env[e].asking
    v = s.replica[e, r]
    admit = s.env[e].decision == ADMIT
    o.requests[e] = 0.0
    o.mask[e] = 0
    for i in range(_shortlist(s, c, e, r, o.ids[e], key)):
        write_row(p, s, e, r, o.ids[e, i], False, row)
        _copy(row, o.requests[e, i])
        o.mask[e, i] = admit
    place = c.width
    request = v.run_head
    while request >= 0:
        write_row(p, s, e, r, request, True, row)
        _copy(row, o.requests[e, place])
        o.ids[e, place] = request
        o.mask[e, place] = not admit
        place += 1
        request = s.request[e, request].next_request
    if p.asks.admit == ALWAYS and admit and v.num_running > 0:
        o.mask[e, o.requests.shape[1]] = 1
    _copy(row[row.shape[0] - o.engine.shape[1] :], o.engine[e])
    o.kind[e] = 0 if admit else 1


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
