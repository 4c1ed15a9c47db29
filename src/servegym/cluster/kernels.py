"""The compiled main loop: what happens next, until a decision is due."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.engine import (
    clear_replica,
    cut_stretch,
    end_step,
    form_step,
    leave_system,
    prefix_hit_tokens,
    steps_ended_by,
    stop_replica,
)
from servegym.cluster.heap import set_event
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.log import log_event
from servegym.cluster.running import blocks_for_steps
from servegym.cluster.state import (
    DECISION,
    DECODE,
    DONE,
    DOWN,
    EV_ARRIVE,
    EV_DISPATCH,
    EV_HOLD,
    EV_REJECT,
    FAULT_DOWN,
    FAULT_SLOW,
    HELD,
    HOLD,
    IDLE,
    LOG_FULL,
    NO_CHOICE,
    QUEUED,
    REJECT,
    REJECTED,
    SCHEDULE,
    SCRAPED_EMITTED,
    SCRAPED_KV_USAGE,
    SCRAPED_RUNNING,
    SCRAPED_WAITING,
    VIEW_DECODE_SEQ,
    VIEW_DECODE_STEP,
    VIEW_KV_CAPACITY,
    VIEW_OUTSTANDING,
    VIEW_OUTSTANDING_PREDICTED,
    VIEW_OUTSTANDING_PROMPT,
    VIEW_PENDING_PREFILL,
    VIEW_PREFILL_RATE,
    VIEW_RELATIVE_SPEED,
    VIEW_UP,
    WAKING,
    Params,
    State,
)
from servegym.engines import VLLM_PRIORITY


@inlined
def advance(p: Params, s: State, e: int) -> int:
    """Run one environment until a decision is due, all requests have ended, or a log is full.

    Returns:
        `DECISION` (for request `s.env[e].deciding`), `SCHEDULE` (for the engine of replica
        `s.env[e].scheduling`, see `cluster.priority`), `DONE` or `LOG_FULL` (call again, with
        room).
    """
    env = s.env[e]
    if env.deciding >= 0:
        return DECISION
    if env.scheduling >= 0:
        return SCHEDULE
    size = s.request.shape[1]
    num_requests = env.num_requests
    while env.num_ended < num_requests:
        if p.record and s.log.shape[1] - max(env.log_len, env.step_len) < 4 * size + 8:
            return LOG_FULL
        replica_s = s.due[e, 0].time_s
        fault_s = math.inf
        if env.next_fault < env.num_faults:
            fault_s = s.fault[e, env.next_fault].time_s
        scrape_s = env.next_scrape_s
        arrival_s = math.inf
        if env.next_arrival < num_requests:
            arrival_s = s.request[e, env.next_arrival].arrival_s
        hold_s = math.inf
        if env.hold_count > 0:
            hold_s = s.held[e, env.hold_first].until_s
        decision_s = min(arrival_s, hold_s)
        if env.return_count > 0:
            decision_s = env.now_s
        if fault_s <= replica_s and fault_s <= scrape_s and fault_s <= decision_s:
            env.now_s = fault_s
            _fault(p, s, e)
        elif replica_s <= scrape_s and replica_s <= decision_s:
            env.now_s = replica_s
            r = s.due[e, 0].replica
            if s.replica[e, r].mode != WAKING:
                end_step(p, s, e, r, replica_s)
            form_step(p, s, e, r, replica_s)
            if s.forming[e, r].choice != NO_CHOICE:
                env.scheduling = r
                return SCHEDULE
        elif scrape_s <= decision_s:
            env.now_s = scrape_s
            for r in range(env.num_replicas):
                measure(p, s, e, r, scrape_s, s.scraped)
            env.last_scrape_s = scrape_s
            env.next_scrape_s = scrape_s + p.metrics_interval_s
        else:
            env.now_s = decision_s
            request = _next_request(p, s, e, decision_s, hold_s, arrival_s)
            if _must_wait(s, e, request):
                _hold(p, s, e, request)
            else:
                env.deciding = request
                return DECISION
    return DONE


@inlined
def _next_request(
    p: Params, s: State, e: int, now_s: float, hold_s: float, arrival_s: float
) -> int:
    """Take the request whose turn it is from the returned, the held or the arriving ones."""
    env = s.env[e]
    size = s.request.shape[1]
    if env.return_count > 0:
        request = s.returned[e, env.return_first]
        env.return_first = (env.return_first + 1) % size
        env.return_count -= 1
        return request
    if hold_s <= arrival_s:
        request = s.held[e, env.hold_first].request
        env.hold_first = (env.hold_first + 1) % size
        env.hold_count -= 1
        return request
    request = env.next_arrival
    env.next_arrival += 1
    env.area += env.in_system * (now_s - env.area_until_s)
    env.area_until_s = now_s
    env.in_system += 1
    if request > 0:
        gap = now_s - env.last_arrival_s
        old = env.arrival_gap_s
        env.arrival_gap_s = gap if request == 1 else old + 0.02 * (gap - old)
    env.last_arrival_s = now_s
    log_event(p, s, e, now_s, EV_ARRIVE, request, -1, 0.0)
    return request


@inlined
def kv_need(s: State, e: int, request: int) -> int:
    """KV tokens a request holds at its end."""
    q = s.request[e, request]
    return q.prompt + q.output - 1


@inlined
def is_allowed(p: Params, s: State, e: int, request: int, action: int) -> bool:
    """Whether an action (a replica, `HOLD` or `REJECT`) may be taken for a request."""
    if action == HOLD:
        return p.allow_hold
    if action == REJECT:
        return p.allow_reject
    if action < 0 or action >= s.env[e].num_replicas:
        return False
    return (
        s.shown[e, VIEW_UP, action] > 0.0
        and kv_need(s, e, request) <= s.shown[e, VIEW_KV_CAPACITY, action]
    )


@inlined
def _must_wait(s: State, e: int, request: int) -> bool:
    need = kv_need(s, e, request)
    for r in range(s.env[e].num_replicas):
        if s.shown[e, VIEW_UP, r] > 0.0 and need <= s.shown[e, VIEW_KV_CAPACITY, r]:
            return False
    return True


@inlined
def _hold(p: Params, s: State, e: int, request: int) -> None:
    i = (s.env[e].hold_first + s.env[e].hold_count) % s.request.shape[1]
    s.held[e, i].request = request
    s.held[e, i].until_s = s.env[e].now_s + p.hold_s
    s.env[e].hold_count += 1
    s.request[e, request].status = HELD
    s.request[e, request].num_holds += 1
    log_event(p, s, e, s.env[e].now_s, EV_HOLD, request, -1, 0.0)


@inlined
def apply(p: Params, s: State, e: int, action: int) -> None:
    """Take the decision that is due; the action must be allowed."""
    env = s.env[e]
    request = env.deciding
    now_s = env.now_s
    env.deciding = -1
    q = s.request[e, request]
    if action == HOLD:
        _hold(p, s, e, request)
        return
    if action == REJECT:
        q.status = REJECTED
        q.finish_s = now_s
        q.replica = -1
        log_event(p, s, e, now_s, EV_REJECT, request, -1, 0.0)
        leave_system(s, e, now_s)
        return
    r = action
    v = s.replica[e, r]
    q.status = QUEUED
    q.replica = r
    q.dispatch_s = now_s
    v.emitted += q.generated
    log_event(p, s, e, now_s, EV_DISPATCH, request, r, 0.0)
    hint = prefix_hit_tokens(p, s, e, r, request, now_s) if p.prefix_caching else 0
    q.hit_hint = hint
    s.shown[e, VIEW_OUTSTANDING, r] += 1
    s.shown[e, VIEW_OUTSTANDING_PROMPT, r] += q.prompt
    s.shown[e, VIEW_OUTSTANDING_PREDICTED, r] += q.predicted
    if math.isnan(q.first_token_s):
        s.shown[e, VIEW_PENDING_PREFILL, r] += q.prompt - hint
    v.last_dispatch_s = now_s
    tail = v.wait_tail
    q.next_request = -1
    if tail >= 0:
        s.request[e, tail].next_request = request
    else:
        v.wait_head = request
    v.wait_tail = request
    v.num_waiting += 1
    if v.mode == IDLE:
        v.mode = WAKING
        set_event(s, e, r, np.nextafter(now_s, math.inf))
    elif v.num_running < p.max_num_seqs[v.type_idx] and (
        tail < 0 or p.engine[v.type_idx] == VLLM_PRIORITY
    ):
        # an engine that could not admit the head of its queue cannot admit what comes behind it
        cut_stretch(p, s, e, r, now_s)


@kernel
def _fault(p: Params, s: State, e: int) -> None:
    i = s.env[e].next_fault
    s.env[e].next_fault = i + 1
    r = s.fault[e, i].replica
    kind = s.fault[e, i].kind
    now_s = s.fault[e, i].time_s
    if kind == FAULT_SLOW:
        s.replica[e, r].speed = s.replica[e, r].base_speed * s.fault[e, i].value
        # faults come before step ends: a step that ends right now is still the one in progress
        cut_stretch(p, s, e, r, np.nextafter(now_s, -math.inf))
    elif kind == FAULT_DOWN:
        if s.due[e, s.replica[e, r].event_pos].time_s <= now_s and s.replica[e, r].mode != WAKING:
            end_step(p, s, e, r, now_s)
            s.replica[e, r].mode = IDLE
        stop_replica(p, s, e, r, now_s)
        s.shown[e, VIEW_UP, r] = 0.0
    else:
        s.replica[e, r].mode = IDLE
        s.shown[e, VIEW_UP, r] = 1.0


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
    if v.mode == DECODE and v.seg_steps > 1:
        ended = steps_ended_by(p, s, e, r, time_s)
        used += blocks_for_steps(p, s, e, r, v.iteration + 1, ended)
        emitted += ended * v.num_decodes
    out[e, SCRAPED_RUNNING, r] = v.num_running
    out[e, SCRAPED_WAITING, r] = v.num_waiting
    out[e, SCRAPED_KV_USAGE, r] = used / blocks
    out[e, SCRAPED_EMITTED, r] = emitted


@kernel
def reset_env(p: Params, s: State, e: int) -> None:
    """Put everything but the inputs of one environment into its initial state."""
    env = s.env[e]
    for i in range(env.num_requests):
        q = s.request[e, i]
        q.status = 0
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
        q.preset_hit = 0
        q.next_request = -1
        q.prev_request = -1
        q.heap_pos = -1
        q.table_len = 0
        s.order[e, i].key = q.slo_class
        s.order[e, i].idle_since_s = q.arrival_s
    s.shown[e] = 0.0
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
        s.shown[e, VIEW_UP, r] = 1.0
        nominal = p.nominal[v.type_idx]
        for i in range(nominal.shape[0]):
            s.shown[e, VIEW_RELATIVE_SPEED + i, r] = nominal[i]
        s.shown[e, VIEW_RELATIVE_SPEED, r] *= v.base_speed
        s.shown[e, VIEW_PREFILL_RATE, r] *= v.base_speed
        s.shown[e, VIEW_DECODE_STEP, r] /= v.base_speed
        s.shown[e, VIEW_DECODE_SEQ, r] /= v.base_speed
        clear_replica(p, s, e, r)
    s.scraped[e] = 0.0
    s.itl_count[e] = 0
    env.now_s = 0.0
    env.next_arrival = 0
    env.deciding = -1
    env.scheduling = -1
    env.next_fault = 0
    env.next_scrape_s = 0.0 if p.metrics_interval_s > 0.0 else math.inf
    env.last_scrape_s = 0.0
    env.hold_first = 0
    env.hold_count = 0
    env.return_first = 0
    env.return_count = 0
    env.in_system = 0
    env.area = 0.0
    env.area_until_s = 0.0
    env.num_ended = 0
    env.good = 0.0
    env.arrival_gap_s = 0.0
    env.last_arrival_s = 0.0
    env.engine_steps = 0
    env.log_len = 0
    env.step_len = 0
