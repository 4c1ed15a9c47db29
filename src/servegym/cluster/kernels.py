"""The compiled main loop: what happens next, until a decision is due."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from servegym.cluster.engine import (
    blocks_for_steps,
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
from servegym.cluster.log import log_event
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
    QUEUED,
    REJECT,
    REJECTED,
    SCRAPED_EMITTED,
    SCRAPED_KV_USAGE,
    SCRAPED_RUNNING,
    SCRAPED_WAITING,
    WAKING,
    Params,
    State,
)


@njit(cache=True, nogil=True)
def advance(p: Params, s: State, e: int) -> int:
    """Run one environment until a decision is due, all requests have ended, or a log is full.

    Returns:
        `DECISION` (for request `s.env[e].deciding`), `DONE` or `LOG_FULL` (call again with more room).
    """
    if s.env[e].deciding >= 0:
        return DECISION
    size = s.request.shape[1]
    num_requests = s.env[e].num_requests
    while s.env[e].num_ended < num_requests:
        if p.record and s.log.shape[1] - max(s.env[e].log_len, s.env[e].step_len) < 4 * size + 8:
            return LOG_FULL
        replica_s = s.due[e, 0].time_s
        fault_s = math.inf
        if s.env[e].next_fault < s.env[e].num_faults:
            fault_s = s.fault[e, s.env[e].next_fault].time_s
        scrape_s = s.env[e].next_scrape_s
        arrival_s = math.inf
        if s.env[e].next_arrival < num_requests:
            arrival_s = s.request[e, s.env[e].next_arrival].arrival_s
        hold_s = math.inf
        if s.env[e].hold_count > 0:
            hold_s = s.held[e, s.env[e].hold_first].until_s
        decision_s = min(arrival_s, hold_s)
        if s.env[e].return_count > 0:
            decision_s = s.env[e].now_s
        if fault_s <= replica_s and fault_s <= scrape_s and fault_s <= decision_s:
            s.env[e].now_s = fault_s
            _fault(p, s, e)
        elif replica_s <= scrape_s and replica_s <= decision_s:
            s.env[e].now_s = replica_s
            r = s.due[e, 0].replica
            if s.replica[e, r].mode != WAKING:
                end_step(p, s, e, r, replica_s)
            form_step(p, s, e, r, replica_s)
        elif scrape_s <= decision_s:
            s.env[e].now_s = scrape_s
            for r in range(s.env[e].num_replicas):
                measure(p, s, e, r, scrape_s, s.scraped)
            s.env[e].last_scrape_s = scrape_s
            s.env[e].next_scrape_s = scrape_s + p.metrics_interval_s
        else:
            s.env[e].now_s = decision_s
            request = _next_request(p, s, e, decision_s, hold_s, arrival_s)
            if _must_wait(p, s, e, request):
                _hold(p, s, e, request)
            else:
                s.env[e].deciding = request
                return DECISION
    return DONE


@njit(cache=True, nogil=True)
def _next_request(
    p: Params, s: State, e: int, now_s: float, hold_s: float, arrival_s: float
) -> int:
    """Take the request whose turn it is from the returned, the held or the arriving ones."""
    size = s.request.shape[1]
    if s.env[e].return_count > 0:
        request = s.returned[e, s.env[e].return_first]
        s.env[e].return_first = (s.env[e].return_first + 1) % size
        s.env[e].return_count -= 1
        return request
    if hold_s <= arrival_s:
        request = s.held[e, s.env[e].hold_first].request
        s.env[e].hold_first = (s.env[e].hold_first + 1) % size
        s.env[e].hold_count -= 1
        return request
    request = s.env[e].next_arrival
    s.env[e].next_arrival += 1
    s.env[e].area += s.env[e].in_system * (now_s - s.env[e].area_until_s)
    s.env[e].area_until_s = now_s
    s.env[e].in_system += 1
    if request > 0:
        gap = now_s - s.env[e].last_arrival_s
        old = s.env[e].arrival_gap_s
        s.env[e].arrival_gap_s = gap if request == 1 else old + 0.02 * (gap - old)
    s.env[e].last_arrival_s = now_s
    log_event(p, s, e, now_s, EV_ARRIVE, request, -1, 0.0)
    return request


@njit(cache=True, nogil=True)
def fits(p: Params, s: State, e: int, r: int, request: int) -> bool:
    """Whether a replica's KV cache can hold a request to its end."""
    need = s.request[e, request].prompt + s.request[e, request].output - 1
    return need <= p.num_blocks[s.replica[e, r].type_idx] * p.block_size


@njit(cache=True, nogil=True)
def is_allowed(p: Params, s: State, e: int, request: int, action: int) -> bool:
    """Whether an action (a replica, `HOLD` or `REJECT`) may be taken for a request."""
    if action == HOLD:
        return p.allow_hold
    if action == REJECT:
        return p.allow_reject
    if action < 0 or action >= s.env[e].num_replicas:
        return False
    return s.replica[e, action].mode != DOWN and fits(p, s, e, action, request)


@njit(cache=True, nogil=True)
def _must_wait(p: Params, s: State, e: int, request: int) -> bool:
    for r in range(s.env[e].num_replicas):
        if s.replica[e, r].mode != DOWN and fits(p, s, e, r, request):
            return False
    return True


@njit(cache=True, nogil=True)
def _hold(p: Params, s: State, e: int, request: int) -> None:
    i = (s.env[e].hold_first + s.env[e].hold_count) % s.request.shape[1]
    s.held[e, i].request = request
    s.held[e, i].until_s = s.env[e].now_s + p.hold_s
    s.env[e].hold_count += 1
    s.request[e, request].status = HELD
    s.request[e, request].num_holds += 1
    log_event(p, s, e, s.env[e].now_s, EV_HOLD, request, -1, 0.0)


@njit(cache=True, nogil=True)
def apply(p: Params, s: State, e: int, action: int) -> None:
    """Take the decision that is due; the action must be allowed."""
    request = s.env[e].deciding
    now_s = s.env[e].now_s
    s.env[e].deciding = -1
    if action == HOLD:
        _hold(p, s, e, request)
        return
    if action == REJECT:
        s.request[e, request].status = REJECTED
        s.request[e, request].finish_s = now_s
        s.request[e, request].replica = -1
        log_event(p, s, e, now_s, EV_REJECT, request, -1, 0.0)
        leave_system(s, e, now_s)
        return
    r = action
    s.request[e, request].status = QUEUED
    s.request[e, request].replica = r
    s.request[e, request].dispatch_s = now_s
    s.replica[e, r].emitted += s.request[e, request].generated
    log_event(p, s, e, now_s, EV_DISPATCH, request, r, 0.0)
    hint = prefix_hit_tokens(p, s, e, r, request)
    s.request[e, request].hit_hint = hint
    s.replica[e, r].outstanding += 1
    s.replica[e, r].outstanding_prompt += s.request[e, request].prompt
    s.replica[e, r].outstanding_predicted += s.request[e, request].predicted
    if math.isnan(s.request[e, request].first_token_s):
        s.replica[e, r].pending_prefill += s.request[e, request].prompt - hint
    s.replica[e, r].last_dispatch_s = now_s
    tail = s.replica[e, r].wait_tail
    s.request[e, request].next_request = -1
    if tail >= 0:
        s.request[e, tail].next_request = request
    else:
        s.replica[e, r].wait_head = request
    s.replica[e, r].wait_tail = request
    s.replica[e, r].num_waiting += 1
    if s.replica[e, r].mode == IDLE:
        s.replica[e, r].mode = WAKING
        set_event(s, e, r, np.nextafter(now_s, math.inf))
    elif tail < 0 and s.replica[e, r].num_running < p.max_num_seqs[s.replica[e, r].type_idx]:
        # an engine that could not admit the head of its queue cannot admit what comes behind it
        cut_stretch(p, s, e, r, now_s)


@njit(cache=True, nogil=True)
def _fault(p: Params, s: State, e: int) -> None:
    i = s.env[e].next_fault
    s.env[e].next_fault = i + 1
    r = s.fault[e, i].replica
    kind = s.fault[e, i].kind
    now_s = s.fault[e, i].time_s
    if kind == FAULT_SLOW:
        s.replica[e, r].speed = s.replica[e, r].base_speed * s.fault[e, i].value
        cut_stretch(p, s, e, r, now_s)
    elif kind == FAULT_DOWN:
        if s.due[e, s.replica[e, r].event_pos].time_s <= now_s and s.replica[e, r].mode != WAKING:
            end_step(p, s, e, r, now_s)
            s.replica[e, r].mode = IDLE
        stop_replica(p, s, e, r, now_s)
    else:
        s.replica[e, r].mode = IDLE


@njit(cache=True, nogil=True)
def measure(p: Params, s: State, e: int, r: int, time_s: float, out: np.ndarray) -> None:
    """Write what the engine of replica `r` reports at `time_s` into `out[e, :, r]`."""
    if s.replica[e, r].mode == DOWN:
        out[e, :, r] = 0.0
        return
    blocks = p.num_blocks[s.replica[e, r].type_idx]
    used = blocks - s.replica[e, r].free_blocks
    emitted = s.replica[e, r].emitted
    if s.replica[e, r].mode == DECODE and s.replica[e, r].seg_steps > 1:
        ended = steps_ended_by(p, s, e, r, time_s)
        used += blocks_for_steps(p, s, e, r, s.replica[e, r].iteration + 1, ended)
        emitted += ended * s.replica[e, r].num_decodes
    out[e, SCRAPED_RUNNING, r] = s.replica[e, r].num_running
    out[e, SCRAPED_WAITING, r] = s.replica[e, r].num_waiting
    out[e, SCRAPED_KV_USAGE, r] = used / blocks
    out[e, SCRAPED_EMITTED, r] = emitted


@njit(cache=True, nogil=True)
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
    for r in range(env.num_replicas):
        v = s.replica[e, r]
        v.mode = IDLE
        v.speed = v.base_speed
        v.iteration = 0
        v.num_joined = 0
        v.event_pos = r
        v.outstanding = 0
        v.outstanding_prompt = 0
        v.pending_prefill = 0
        v.outstanding_predicted = 0.0
        v.recent_ttft_s = 0.0
        v.recent_tpot_s = 0.0
        v.last_dispatch_s = -math.inf
        s.due[e, r].replica = r
        s.due[e, r].time_s = math.inf
        clear_replica(p, s, e, r)
    s.scraped[e] = 0.0
    s.itl_count[e] = 0
    env.now_s = 0.0
    env.next_arrival = 0
    env.deciding = -1
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
