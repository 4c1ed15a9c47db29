"""The compiled main loop: what happens next, until a decision is due."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW
from servegym.workflow.online.engine import (
    clear_device,
    end_prefill,
    enter,
    first_end_s,
    first_fetch_s,
    form_prefill,
    free_slot,
    give_slot,
    plan,
    prefill_end_s,
    settle,
    take_end,
)
from servegym.workflow.online.heap import drop_first, push
from servegym.workflow.online.state import (
    BLOCKED,
    DECISION,
    DONE,
    ENDED,
    LLM,
    NOWHERE,
    READY,
    STARTED,
    STUCK,
    TOOL,
    WAIT,
    Params,
    State,
)
from servegym.workflow.online.view import can_start, data_there_s, move_s, view


@inlined
def next_event_s(s: State, e: int) -> float:
    """When the next event is; inf if there is none."""
    env = s.env[e]
    best_s = math.inf
    if env.next_fault < env.num_faults:
        best_s = s.fault[e, env.next_fault].time_s
    for d in range(env.num_devices):
        best_s = min(best_s, s.device[e, d].due_s)
    if env.num_tools > 0:
        best_s = min(best_s, s.tools[e, 0].key)
    if env.next_job < env.num_jobs:
        best_s = min(best_s, s.job[e, env.next_job].arrival_s)
    return best_s


@kernel
def advance(p: Params, s: State, e: int) -> int:
    """Run one environment until a decision is due or all jobs have ended.

    A decision is due when nothing else happens at the present time, something has happened since
    the last `WAIT`, and a ready stage can start; or, for a policy that asks for it, when a stage
    has become ready.

    Returns:
        `DECISION`, `DONE`, or `STUCK`: nothing will ever happen again.
    """
    env = s.env[e]
    if env.deciding != 0:
        return DECISION
    while env.num_ended < env.num_jobs:
        time_s = next_event_s(s, e)
        if time_s > env.now_s and env.changed != 0 and env.num_ready > 0:
            if (env.asks_when_ready != 0 and env.num_fresh > 0) or something_can_start(p, s, e):
                env.deciding = 1
                return DECISION
            env.changed = 0
        if time_s == math.inf:
            return STUCK
        env.now_s = time_s
        _handle(p, s, e, time_s)
    return DONE


@inlined
def _handle(p: Params, s: State, e: int, time_s: float) -> None:
    """Let the first of the events of this moment happen: faults, devices, tools, arrivals."""
    env = s.env[e]
    if env.next_fault < env.num_faults and s.fault[e, env.next_fault].time_s == time_s:
        _fault(p, s, e)
        return
    for d in range(env.num_devices):
        if s.device[e, d].due_s == time_s:
            _device_event(p, s, e, d)
            return
    if env.num_tools > 0 and s.tools[e, 0].key == time_s:
        stage = s.tools[e, 0].stage
        drop_first(s.tools[e], env.num_tools)
        env.num_tools -= 1
        _end_stage(p, s, e, stage)
        return
    _arrive(p, s, e)


@kernel
def _device_event(p: Params, s: State, e: int, d: int) -> None:
    now_s = s.env[e].now_s
    v = s.device[e, d]
    if prefill_end_s(s, e, d) == now_s:
        settle(s, e, d, now_s)
        v.clock = v.prefill_clock
        while v.prefilling > 0:
            stage = end_prefill(s, e, d, now_s)
            if stage >= 0:
                free_slot(s, e, d, stage)
                _end_stage(p, s, e, stage)
        if v.queue_len > 0:
            v.wake_s = np.nextafter(now_s, math.inf)
    elif first_end_s(s, e, d) == now_s:
        settle(s, e, d, now_s)
        stage = take_end(s, e, d)
        free_slot(s, e, d, stage)
        _end_stage(p, s, e, stage)
    elif first_fetch_s(s, e, d) == now_s:
        settle(s, e, d, now_s)
        stage = s.fetches[e, d, 0].stage
        drop_first(s.fetches[e, d], v.num_fetches)
        v.num_fetches -= 1
        enter(p, s, e, d, stage, now_s)
    else:
        settle(s, e, d, now_s)
        v.wake_s = math.inf
        form_prefill(p, s, e, d)
    plan(p, s, e, d)


@kernel
def _end_stage(p: Params, s: State, e: int, stage: int) -> None:
    """A stage has ended: its children may become ready, its job may leave the system."""
    env, q = s.env[e], s.stage[e, stage]
    now_s = env.now_s
    q.status = ENDED
    q.finish_s = now_s
    env.num_started -= 1
    env.changed = 1
    env.makespan_s = now_s
    job = s.job[e, q.job]
    job.num_left -= 1
    job.work_left_s -= q.work_s
    if q.kind != TOOL:
        job.num_running -= 1
    for i in range(q.succ_first, q.succ_stop):
        child = s.edge[e, i].child
        s.stage[e, child].parents_left -= 1
        if s.stage[e, child].parents_left == 0:
            become_ready(s, e, child)
    if job.num_left == 0:
        job.finish_s = now_s
        job.work_left_s = 0.0  # without what rounding left
        settle_area(s, e)
        env.in_system -= 1
        env.weight_in_system -= job.weight
        env.num_ended += 1
        if now_s - job.arrival_s <= job.deadline_s:
            env.good += job.weight


@inlined
def settle_area(s: State, e: int) -> None:
    """Bring the integrals of jobs in the system up to the present."""
    env = s.env[e]
    passed_s = env.now_s - env.area_until_s
    env.area += env.in_system * passed_s
    env.weighted_area += env.weight_in_system * passed_s
    env.area_until_s = env.now_s


@inlined
def become_ready(s: State, e: int, stage: int) -> None:
    """All parents have ended: a tool call begins, another stage waits for a device."""
    env, q = s.env[e], s.stage[e, stage]
    now_s = env.now_s
    job = s.job[e, q.job]
    if q.hidden != 0 and q.num_restarts == 0:
        job.work_left_s += q.work_s
    q.ready_s = now_s
    if q.kind == TOOL:
        q.status = STARTED
        q.start_s = now_s
        q.begin_s = now_s
        q.due_s = now_s + q.mean_s
        push(s.tools[e], env.num_tools, now_s + s.truth[e, stage].tool_s, env.tool_order, stage)
        env.num_tools += 1
        env.tool_order += 1
        env.num_started += 1
        return
    q.status = READY
    job.num_ready += 1
    i = _place_in_ready(s, e, stage)
    ready = s.ready[e]
    for k in range(env.num_ready, i, -1):
        ready[k] = ready[k - 1]
    ready[i] = stage
    env.num_ready += 1
    s.fresh[e, env.num_fresh] = stage
    env.num_fresh += 1
    for t in range(env.num_types):
        s.ready_on[e, t] += (q.types >> t) & 1
    if q.kind == LLM:
        env.least_kv = min(env.least_kv, s.stage[e, stage].kv)
    env.changed = 1


@inlined
def _place_in_ready(s: State, e: int, stage: int) -> int:
    """Where a stage stands, or would stand, among the ready ones."""
    rank_s = s.stage[e, stage].rank_s
    low, high = 0, s.env[e].num_ready
    while low < high:
        middle = (low + high) >> 1
        other = s.ready[e, middle]
        other_s = s.stage[e, other].rank_s
        if other_s > rank_s or (other_s == rank_s and other < stage):
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def something_can_start(p: Params, s: State, e: int) -> bool:
    """Whether any ready stage could start; looks at the stages only if KV memory is short."""
    env = s.env[e]
    most_free = -1
    for d in range(env.num_devices):
        v = s.device[e, d]
        if v.up != 0 and v.num_running < v.slots and s.ready_on[e, v.type_idx] > 0:
            if p.engine_idx[v.type_idx] < 0:
                return True
            most_free = max(most_free, v.kv_capacity - v.kv_reserved)
    if most_free < env.least_kv:
        return False
    least = np.int64(1 << 62)
    for i in range(env.num_ready):
        stage = s.ready[e, i]
        if s.stage[e, stage].kind == LLM:
            least = min(least, s.stage[e, stage].kv)
            for d in range(env.num_devices):
                if can_start(view(p, s, e), stage, d):
                    return True
    env.least_kv = least
    return False


@inlined
def is_allowed(p: Params, s: State, e: int, action: int) -> bool:
    """Whether `stage * num_devices + device` can start, or there is something to `WAIT` for."""
    env = s.env[e]
    if action == WAIT:
        return next_event_s(s, e) < math.inf
    if action < 0 or action >= env.num_stages * env.num_devices:
        return False
    stage, d = action // env.num_devices, action % env.num_devices
    return s.stage[e, stage].status == READY and can_start(view(p, s, e), stage, d)


@kernel
def apply(p: Params, s: State, e: int, action: int) -> None:
    """Take the decision that is due; the action must be allowed."""
    env = s.env[e]
    env.deciding = 0
    env.num_fresh = 0
    env.num_decisions += 1
    if action == WAIT:
        env.changed = 0
        return
    stage, d = action // env.num_devices, action % env.num_devices
    now_s = env.now_s
    q, v = s.stage[e, stage], s.device[e, d]
    i = _place_in_ready(s, e, stage)
    for k in range(i, env.num_ready - 1):
        s.ready[e, k] = s.ready[e, k + 1]
    env.num_ready -= 1
    for t in range(env.num_types):
        s.ready_on[e, t] -= (q.types >> t) & 1
    job = s.job[e, q.job]
    job.num_ready -= 1
    job.num_running += 1
    env.num_started += 1
    q.status = STARTED
    q.start_s = now_s
    q.device = d
    w = view(p, s, e)
    q.begin_s = max(now_s + move_s(w, stage, d), data_there_s(w, stage, d))
    q.due_s = q.begin_s + s.expected_s[e, stage, v.type_idx] / v.speed
    v.last_job = q.job
    v.last_template = job.template
    settle(s, e, d, now_s)
    give_slot(p, s, e, d, stage)
    if q.begin_s > now_s:
        push(s.fetches[e, d], v.num_fetches, q.begin_s, v.order, stage)
        v.num_fetches += 1
        v.order += 1
    else:
        enter(p, s, e, d, stage, now_s)
    plan(p, s, e, d)


@kernel
def _fault(p: Params, s: State, e: int) -> None:
    env = s.env[e]
    f = s.fault[e, env.next_fault]
    env.next_fault += 1
    env.changed = 1
    d = f.replica
    v = s.device[e, d]
    settle(s, e, d, env.now_s)
    if f.kind == FAULT_SLOW:
        v.speed = v.base_speed * f.value
        plan(p, s, e, d)
    elif f.kind == FAULT_DOWN:
        v.up = 0
        lost = v.num_running
        clear_device(s, e, d)
        for i in range(lost):
            stage = s.running[e, d, i]
            q = s.stage[e, stage]
            q.device = NOWHERE
            q.num_restarts += 1
            q.hit = 0
            s.job[e, q.job].num_running -= 1
            env.num_started -= 1
            become_ready(s, e, stage)
    else:
        v.up = 1


@kernel
def _arrive(p: Params, s: State, e: int) -> None:
    env = s.env[e]
    job = s.job[e, env.next_job]
    env.next_job += 1
    env.changed = 1
    settle_area(s, e)
    env.in_system += 1
    env.weight_in_system += job.weight
    for v in range(job.first_stage, job.first_stage + job.num_stages):
        s.stage[e, v].status = BLOCKED
    for v in range(job.first_stage, job.first_stage + job.num_stages):
        if s.stage[e, v].parents_left == 0:
            become_ready(s, e, v)
