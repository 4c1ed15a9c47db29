"""Stepping a batch of preemption environments in one compiled call."""

from __future__ import annotations

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.priority import resume
from servegym.cluster.state import (
    ADMIT,
    ASK_PICK_OR_NONE,
    DECISION,
    NOBODY,
    SCHEDULE,
    Params,
    State,
)
from servegym.envs.kernels import waited
from servegym.policy.ordering import OrderingFeature
from servegym.policy.ordering_rows import write_row
from servegym.typing import BoolArray, Float32Array, FloatArray, Int8Array, IntArray

_REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])


@inlined
def _run_to_choice(p: Params, s: State, e: int) -> bool:
    """Run until a request is to be picked; return False at the end of the episode."""
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason == SCHEDULE
        apply(p, s, e, 0)  # there is one replica


@kernel
def begin(p: Params, s: State, e: int) -> bool:
    """Run a new episode to its first choice; return False if it has none."""
    return _run_to_choice(p, s, e)


@inlined
def _shortlist(
    p: Params,
    s: State,
    e: int,
    r: int,
    by_arrival: bool,
    width: int,
    chosen: IntArray,
    key: FloatArray,
) -> int:
    """Write the first `width` waiting requests of an order, in order; return how many there are."""
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


@kernel
def write_choice(
    p: Params,
    s: State,
    e: int,
    by_arrival: bool,
    width: int,
    row: FloatArray,
    key: FloatArray,
    requests_out: Float32Array,
    engine_out: Float32Array,
    kind_out: Int8Array,
    mask_out: Int8Array,
    ids: IntArray,
) -> None:
    """Write the observation of one pending choice: waiting rows, then running rows.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        by_arrival: Whether a long queue is cut by arrival, else by predicted tokens left.
        width: Rows for waiting requests.
        row: Working memory, `float64[NUM_ORDERING_FEATURES]`.
        key: Working memory, `float64[width]`.
        requests_out: `float32[E, rows, NUM_ORDERING_FEATURES]`.
        engine_out: `float32[E, number of the engine's features]`.
        kind_out: 0 to admit, 1 to preempt, `int8[E]`.
        mask_out: `int8[E, actions]`.
        ids: Request of each row, `int64[E, rows]`.
    """
    r = s.env[e].scheduling
    v, f = s.replica[e, r], s.forming[e, r]
    admit = f.choice == ADMIT
    requests_out[e] = 0.0
    mask_out[e] = 0
    count = _shortlist(p, s, e, r, by_arrival, width, ids[e], key)
    for i in range(count):
        write_row(p, s, e, r, ids[e, i], False, row)
        for k in range(row.shape[0]):
            requests_out[e, i, k] = row[k]
        mask_out[e, i] = admit
    place = width
    request = v.run_head
    while request >= 0:
        write_row(p, s, e, r, request, True, row)
        for k in range(row.shape[0]):
            requests_out[e, place, k] = row[k]
        ids[e, place] = request
        mask_out[e, place] = not admit
        place += 1
        request = s.request[e, request].next_request
    if p.asks == ASK_PICK_OR_NONE and admit and v.num_running > 0:
        mask_out[e, requests_out.shape[1]] = 1
    own = row.shape[0] - engine_out.shape[1]
    for k in range(engine_out.shape[1]):
        engine_out[e, k] = row[own + k]
    kind_out[e] = 0 if admit else 1


@kernel
def step_range(
    p: Params,
    s: State,
    first: int,
    stop: int,
    actions: IntArray,
    active: BoolArray,
    goodput: bool,
    scale: float,
    by_arrival: bool,
    width: int,
    row: FloatArray,
    key: FloatArray,
    requests_out: Float32Array,
    engine_out: Float32Array,
    kind_out: Int8Array,
    mask_out: Int8Array,
    ids: IntArray,
    earned: FloatArray,
    reward_out: Float32Array,
    done_out: BoolArray,
    dt_out: FloatArray,
) -> None:
    """Pick, go on, reward and observe in environments `first..stop-1` that are active."""
    rows = requests_out.shape[1]
    for e in range(first, stop):
        if not active[e]:
            continue
        before_s = s.env[e].now_s
        picked = NOBODY if actions[e] == rows else ids[e, actions[e]]
        s.forming[e, s.env[e].scheduling].picked = picked
        more = resume(p, s, e) or _run_to_choice(p, s, e)
        dt_out[e] = s.env[e].now_s - before_s
        sofar = s.env[e].good if goodput else -waited(s, e)
        reward_out[e] = (sofar - earned[e]) / scale
        earned[e] = sofar
        done_out[e] = not more
        if more:
            write_choice(
                p,
                s,
                e,
                by_arrival,
                width,
                row,
                key,
                requests_out,
                engine_out,
                kind_out,
                mask_out,
                ids,
            )
        else:
            requests_out[e] = 0.0
            engine_out[e] = 0.0
            kind_out[e] = 0
            mask_out[e] = 0
            mask_out[e, 0] = 1  # a mask without any action breaks samplers
