"""The compiled main loop: what happens next, until a decision is due.

Kernels of the whole project use the same letters: `p` for `Params` and `s` for `State`, `e` for the
number of an environment, `r` of a replica and `t` of its type, `v` for the record of a replica, `q`
of a request and `f` of the step that forms; in environments `c` for what a kernel is set to and `o`
for what it writes.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.dispatch import hold, reject, route, send, set_up
from servegym.cluster.emission import next_with
from servegym.cluster.engine import clear_replica, end_step, form_step, stop_replica
from servegym.cluster.entry import ADVANCE, APPLY, INFER, entry
from servegym.cluster.jit import helper, inlined, kernel
from servegym.cluster.loads import is_loaded, land_load
from servegym.cluster.lockstep import step_together
from servegym.cluster.log import log_event
from servegym.cluster.migration import go_off_migration, migrate, reset_moves
from servegym.cluster.pairing import may_migrate
from servegym.cluster.priority import form_by_priority
from servegym.cluster.retention import is_retained, let_all_go, let_go
from servegym.cluster.running import blocks_for_steps
from servegym.cluster.state import (
    ADMIT,
    ALWAYS,
    ARRIVAL,
    COPIED,
    DECISION,
    DECODE,
    DISPATCH,
    DONE,
    DOWN,
    EV_ARRIVE,
    EXPIRY,
    FAULT,
    FAULT_DOWN,
    FAULT_SLOW,
    HOLD_OVER,
    IDLE,
    LANDING,
    LOG_FULL,
    MIGRATE,
    NO_DECISION,
    NOBODY,
    OBSERVED_DECODE_SEQ,
    OBSERVED_DECODE_STEP,
    OBSERVED_PREFILL_RATE,
    OBSERVED_RELATIVE_SPEED,
    OBSERVED_UP,
    ORDER,
    PENDING,
    PLACE,
    PLACING,
    PREEMPT,
    QUEUED,
    RETAIN,
    RETAINING,
    RUNNING,
    SCRAPE,
    SCRAPED_EMITTED,
    SCRAPED_KV_USAGE,
    SCRAPED_RUNNING,
    SCRAPED_WAITING,
    TICK,
    WAKING,
    Params,
    State,
)
from servegym.cluster.stretches import catch_up, cut_stretch, steps_ended_by
from servegym.cluster.tiers import reset_tiers
from servegym.cluster.timers import remove_timer, set_timer
from servegym.cluster.transfers import go_off_transfer, place, reset_transfers
from servegym.cluster.turns import ask_retention, may_retain, settle_turn
from servegym.cluster.watch import forget_all
from servegym.workloads.table import ANY_END, BY_ITSELF


@entry(ADVANCE, types.int64, types.int64)
def advance(p: Params, s: State, e: int) -> int:
    """Run one environment until a decision is due, all requests have ended, or a log is full.

    Returns:
        `DECISION` (see `decision`, `deciding` and `asking` of `s.env[e]`), `DONE` or `LOG_FULL`
        (call again, with room).
    """
    env = s.env[e]
    if env.decision != NO_DECISION:
        return DECISION
    env.looked_up = -1
    size = s.request.shape[1]
    num_requests = env.num_requests
    while env.num_ended < num_requests:
        if p.record and s.log.shape[1] - max(env.log_len, env.step_len) < 4 * size + 8:
            return LOG_FULL
        timer_s, kind, order = math.inf, FAULT, 0
        if env.num_timers > 0:
            timer_s = s.timer[e, 0].time_s
            kind = s.timer[e, 0].kind
            order = s.timer[e, 0].order
        engine_s = s.due[e, 0].time_s
        arrival_s = math.inf
        if env.next_arrival < num_requests:
            arrival_s = s.request[e, env.next_arrival].arrival_s
        # at equal times: faults, engines, other timers, arrivals in table order
        if (timer_s < engine_s or (timer_s == engine_s and kind == FAULT)) and (
            timer_s < arrival_s
            or (timer_s == arrival_s and (kind < ARRIVAL or order < env.next_arrival))
        ):
            env.now_s = timer_s
            go_off(p, s, e)
        elif engine_s <= arrival_s:
            env.now_s = engine_s
            r = s.due[e, 0].replica
            if s.replica[e, r].num_ranks > 0:
                step_together(p, s, e, s.replica[e, r].first_rank, engine_s)
            else:
                if s.replica[e, r].mode != WAKING:
                    end_step(p, s, e, r, engine_s)
                form_step(p, s, e, r, engine_s)
        else:
            env.now_s = arrival_s
            arrive_next(p, s, e)
        if env.decision != NO_DECISION:
            return DECISION
    if p.retains:
        for r in range(env.num_replicas):
            let_all_go(p, s, e, r)
    return DONE


@helper
def go_off(p: Params, s: State, e: int) -> None:
    """Do what the first timer was set for."""
    env = s.env[e]
    kind, subject = s.timer[e, 0].kind, s.timer[e, 0].subject
    remove_timer(s, e, 0)
    if kind == FAULT:
        _set_fault(s, e, subject + 1)
        _fault(p, s, e, subject)
    elif kind == SCRAPE:
        for r in range(env.num_replicas):
            measure(p, s, e, r, env.now_s, s.scraped)
        env.last_scrape_s = env.now_s
        set_timer(s, e, env.now_s + p.metrics_interval_s, SCRAPE, 0, 0)
    elif kind == EXPIRY:
        r = s.request[e, subject].replica
        catch_up(p, s, e, r, env.now_s)  # blocks taken by now may have been this turn's already
        if is_retained(s, e, r, subject):
            let_go(p, s, e, r, subject)
    elif kind in (COPIED, TICK):
        go_off_migration(p, s, e, kind, subject)
    elif kind == RETAINING:
        ask_retention(s, e, subject)
    elif LANDING <= kind <= PLACING:
        if p.tiered and kind == LANDING and is_loaded(s, e, subject):
            land_load(p, s, e, subject)
        else:
            go_off_transfer(p, s, e, kind, subject)
    elif kind == ARRIVAL:
        s.request[e, subject].arrival_s = env.now_s
        arrive(p, s, e, subject)
    else:
        env.num_held -= kind == HOLD_OVER
        route(p, s, e, subject)


@helper
def arrive_next(p: Params, s: State, e: int) -> None:
    """Let the next request of the table arrive now."""
    env = s.env[e]
    request = env.next_arrival
    env.next_arrival = next_with(s, e, request + 1, BY_ITSELF)
    arrive(p, s, e, request)


@inlined
def _set_fault(s: State, e: int, i: int) -> None:
    """Set the timer of fault `i`, if there are so many."""
    if i < s.env[e].num_faults:
        set_timer(s, e, s.fault[e, i].time_s, FAULT, i, i)


@inlined
def arrive(p: Params, s: State, e: int, request: int) -> None:
    """A request enters the system and wants a replica."""
    env = s.env[e]
    now_s = env.now_s
    env.area += env.in_system * (now_s - env.area_until_s)
    env.area_until_s = now_s
    env.in_system += 1
    if env.num_arrived > 0:
        gap = now_s - env.last_arrival_s
        old = env.arrival_gap_s
        env.arrival_gap_s = gap if env.num_arrived == 1 else old + 0.02 * (gap - old)
    env.num_arrived += 1
    env.last_arrival_s = now_s
    s.order[e, request].idle_since_s = now_s
    log_event(p, s, e, now_s, EV_ARRIVE, request, -1, 0.0)
    route(p, s, e, request)


@kernel
def may_answer(p: Params, s: State, e: int, answer: int) -> bool:
    """Whether an answer may be given to the decision that is due; see `apply`."""
    env = s.env[e]
    kind, r = env.decision, env.asking
    if kind in (DISPATCH, PLACE):
        return 0 <= answer < s.allowed.shape[1] and s.allowed[e, answer]
    if kind == ADMIT and answer == NOBODY:
        return p.asks.admit == ALWAYS and s.replica[e, r].num_running > 0
    if kind == MIGRATE:
        return answer == NOBODY or may_migrate(s, e, answer)
    if kind in (ADMIT, PREEMPT):
        status = QUEUED if kind == ADMIT else RUNNING
        return (
            0 <= answer < env.num_requests
            and s.request[e, answer].replica == r
            and s.request[e, answer].status == status
        )
    if kind == RETAIN:
        return may_retain(p, s, e, r, answer)
    return True


@entry(APPLY, types.void, types.int64, types.int64)
def apply(p: Params, s: State, e: int, answer: int) -> None:
    """Take the decision that is due.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        answer: To `DISPATCH` and `PLACE` an action that `s.allowed[e]` allows; to `ADMIT` and
            `PREEMPT` a request, or `NOBODY`; to `ORDER` anything: the keys have been written; to
            `MIGRATE` `NOBODY`, or a request times the replica columns of `s` plus the replica it
            goes to; to `RETAIN` what becomes of the KV, and if that is `KEEP`, for `keep_s` of
            `s.env[e]`.
    """
    env = s.env[e]
    request, r = env.deciding, env.asking
    kind = env.decision
    env.decision = NO_DECISION
    env.deciding = -1
    env.asking = -1
    if kind == DISPATCH:
        width = s.replica.shape[1]
        if answer < width:
            send(p, s, e, request, answer)
        elif answer == width:
            hold(p, s, e, request)
        else:
            reject(p, s, e, request)
        return
    if kind == PLACE:
        place(p, s, e, request, answer)
        return
    if kind == MIGRATE:
        if answer != NOBODY:
            migrate(p, s, e, answer)
        return
    if kind == RETAIN:
        settle_turn(p, s, e, r, request, answer)
        return
    if kind == ORDER:
        s.forming[e, r].keyed = 1
    else:
        s.forming[e, r].picked = answer
    form_by_priority(p, s, e, r, env.now_s)


@inlined
def change_speed(p: Params, s: State, e: int, r: int, multiplier: float, now_s: float) -> None:
    """Let a replica's steps that begin from now on be faster or slower than nominal."""
    v = s.replica[e, r]
    v.speed = v.base_speed * multiplier
    # faults come before step ends: a step that ends right now is still the one in progress
    cut_stretch(p, s, e, r, np.nextafter(now_s, -math.inf))


@helper
def _fault(p: Params, s: State, e: int, i: int) -> None:
    r = s.fault[e, i].replica
    kind = s.fault[e, i].kind
    now_s = s.fault[e, i].time_s
    if kind == FAULT_SLOW:
        change_speed(p, s, e, r, s.fault[e, i].value, now_s)
    elif kind == FAULT_DOWN:
        if s.due[e, s.replica[e, r].event_pos].time_s <= now_s and s.replica[e, r].mode != WAKING:
            end_step(p, s, e, r, now_s)
            s.replica[e, r].mode = IDLE
        stop_replica(p, s, e, r, now_s)
        set_up(s, e, r, False)
    else:
        s.replica[e, r].mode = IDLE
        set_up(s, e, r, True)


@inlined
def measure(p: Params, s: State, e: int, r: int, time_s: float, out: np.ndarray) -> None:
    """Write what the engine of replica `r` reports at `time_s` into `out[e, :, r]`."""
    v = s.replica[e, r]
    if v.mode == DOWN:
        out[e, :, r] = 0.0
        return
    blocks = p.num_blocks[v.type_idx]
    used = blocks - v.free_blocks
    emitted = v.emitted
    if v.mode == DECODE and v.stretch_steps > 1:
        ended = steps_ended_by(p, s, e, r, time_s)
        used += blocks_for_steps(p, s, e, r, v.iteration + 1, ended)
        emitted += ended * v.num_decodes
    out[e, SCRAPED_RUNNING, r] = v.num_running
    out[e, SCRAPED_WAITING, r] = v.num_waiting
    if p.moves_kv or p.tiered:
        out[e, SCRAPED_WAITING, r] += s.link[e, r].num_remote
    out[e, SCRAPED_KV_USAGE, r] = used / blocks
    out[e, SCRAPED_EMITTED, r] = emitted


@inlined
def reset_request(s: State, e: int, i: int) -> None:
    """Put everything but the inputs of one request into its initial state."""
    q = s.request[e, i]
    q.status = PENDING
    if q.after != BY_ITSELF:
        q.arrival_s = math.nan
    q.replica = -1
    q.computed = 0
    q.generated = 0
    q.chunk = 0
    q.join_iter = -1
    q.dispatch_s = math.nan
    q.scheduled_s = math.nan
    q.first_token_s = math.nan
    q.finish_s = math.nan
    q.last_token_s = math.nan
    q.num_preemptions = 0
    q.num_restarts = 0
    q.num_holds = 0
    q.cached = -1
    q.hit_hint = 0
    q.landed_tokens = 0
    q.next_request = -1
    q.prev_request = -1
    q.heap_pos = -1
    q.timer_pos = -1
    q.table_len = 0
    s.order[e, i].key = q.slo_class
    s.order[e, i].idle_since_s = q.arrival_s


@kernel
def reset_env(p: Params, s: State, e: int) -> None:
    """Put everything but the inputs of one environment into its initial state."""
    env = s.env[e]
    for i in range(env.num_requests):
        reset_request(s, e, i)
    s.observation[e] = 0.0
    for r in range(env.num_replicas):
        v = s.replica[e, r]
        v.mode = IDLE
        v.speed = v.base_speed
        v.iteration = 0
        v.prefill_steps = 0
        v.num_joined = 0
        v.event_pos = r
        v.last_dispatch_s = -math.inf
        s.due[e, r].replica = r
        s.due[e, r].time_s = math.inf
        s.observation[e, OBSERVED_UP, r] = 1.0
        nominal = p.nominal[v.type_idx]
        for i in range(nominal.shape[0]):
            s.observation[e, OBSERVED_RELATIVE_SPEED + i, r] = nominal[i]
        s.observation[e, OBSERVED_RELATIVE_SPEED, r] *= v.base_speed
        s.observation[e, OBSERVED_PREFILL_RATE, r] *= v.base_speed
        s.observation[e, OBSERVED_DECODE_STEP, r] /= v.base_speed
        s.observation[e, OBSERVED_DECODE_SEQ, r] /= v.base_speed
        clear_replica(p, s, e, r)
    if p.moves_kv:
        reset_transfers(s, e)
    if p.tiered:
        reset_tiers(p, s, e)
    s.scraped[e] = 0.0
    s.itl_count[e] = 0
    width = s.replica.shape[1]
    for r in range(width):
        s.allowed[e, r] = False
    s.allowed[e, width] = p.allow_hold
    s.allowed[e, width + 1] = p.allow_reject
    env.now_s = 0.0
    env.next_arrival = 0
    env.num_arrived = 0
    env.next_sent = next_with(s, e, 0, ANY_END)
    env.decision = NO_DECISION
    env.deciding = -1
    env.asking = -1
    env.looked_up = -1
    env.num_timers = 0
    env.num_set = 0
    env.keep_s = p.retain_kv_s
    env.num_held = 0
    env.last_scrape_s = 0.0
    env.num_up = env.num_replicas
    env.num_allowed = 0
    env.allowed_above = math.inf
    env.allowed_up_to = 0.0
    env.in_system = 0
    env.area = 0.0
    env.area_until_s = 0.0
    env.num_ended = 0
    env.good = 0.0
    env.arrival_gap_s = 0.0
    env.last_arrival_s = 0.0
    if p.entries[INFER] != 0:
        forget_all(s, e)
    env.first_ended = -1
    env.last_ended = -1
    env.last_learnt = -1
    env.looked_s = 0.0
    env.expected_spread = 0.0
    s.length_sums[e] = 0.0
    env.engine_steps = 0
    env.log_len = 0
    env.step_len = 0
    _set_fault(s, e, 0)
    if p.metrics_interval_s > 0.0:
        set_timer(s, e, 0.0, SCRAPE, 0, 0)
    if p.migration.on:
        reset_moves(s, e)
        set_timer(s, e, p.migration.interval_s, TICK, 0, 0)
