"""The compiled main loop: what happens next, until a decision is due."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.rng import mix64, uniform
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW
from servegym.cluster.steptime import decode_span_s, dense_s, prefill_s
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
from servegym.workflow.online.pool import Pool
from servegym.workflow.online.state import (
    BLOCKED,
    DECISION,
    DONE,
    ENDED,
    FUTURE,
    LLM,
    NOWHERE,
    READY,
    STARTED,
    STUCK,
    TASK,
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


@inlined
def _normal(noise_seed: np.uint64, stage: int) -> float:
    base = mix64(noise_seed ^ mix64(np.uint64(stage) + np.uint64(0x9E3779B97F4A7C15)))
    u, w = uniform(base), uniform(base + np.uint64(0x9E3779B97F4A7C15))
    return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * w)


@inlined
def llm_time_s(p: Params, t: int, prompt: int, output: float) -> float:
    """Expected duration of an LLM stage on an engine type, beside a typical batch of its like."""
    k = p.engine_idx[t]
    budget = p.engine.max_num_batched_tokens[k]
    total_s, done = 0.0, 0
    while done < prompt:
        chunk = min(budget, prompt - done)
        total_s += dense_s(p.engine, k, chunk) + prefill_s(p.engine, k, chunk, done)
        done += chunk
    return total_s + (output - 1.0) * llm_step_s(p, t, prompt, output)


@inlined
def typical_batch(p: Params, t: int, prompt: int, output: float) -> int:
    """Sequences of this size that an engine type is expected to run together."""
    return max(1, min(p.typical_batch[t], int(p.kv_tokens[t] / (prompt + output))))


@inlined
def llm_step_s(p: Params, t: int, prompt: int, output: float) -> float:
    """Expected decode step of an engine type, in a typical batch of such sequences."""
    k = p.engine_idx[t]
    batch = typical_batch(p, t, prompt, output)
    kv_tokens = int(batch * (prompt + 0.5 * output))
    return decode_span_s(p.engine, k, batch, kv_tokens, 1)


@kernel
def load_jobs(p: Params, pool: Pool, s: State, e: int, job_idx: np.ndarray) -> None:
    """Copy jobs into an environment whose devices, links and arrivals are set; then reset it."""
    env = s.env[e]
    env.num_types = p.slots.shape[0]
    stage, edge = 0, 0
    for j in range(env.num_jobs):
        kind = pool.job[job_idx[j]]
        job = s.job[e, j]
        job.first_stage = stage
        job.num_stages = kind.num_stages
        job.template = kind.template
        job.deadline_s = kind.deadline_s * env.deadline_scale
        job.weight = kind.weight
        for i in range(kind.num_edges):
            link = pool.edge[kind.first_edge + i]
            s.edge[e, edge + i].parent = stage + link.parent
            s.edge[e, edge + i].child = stage + link.child
            s.edge[e, edge + i].data_bytes = link.data_bytes
            s.edge[e, edge + i].shared = link.shared
            s.pred[e, edge + i] = edge + pool.pred[kind.first_edge + i]
        for i in range(kind.num_stages):
            given = pool.stage[kind.first_stage + i]
            q = s.stage[e, stage + i]
            q.job = j
            q.kind = given.kind
            q.label = given.label
            q.hidden = given.hidden
            q.prompt = given.prompt
            q.expected_output = given.expected_output
            q.mean_s = given.expected_tool_s
            q.succ_first = edge + given.succ_first
            q.succ_stop = edge + given.succ_stop
            q.pred_first = edge + given.pred_first
            q.pred_stop = edge + given.pred_stop
            _draw_truth(p, pool, s, e, stage + i, kind.first_stage + i)
        stage += kind.num_stages
        edge += kind.num_edges
    env.num_stages = stage
    env.num_edges = edge
    reset_env(p, s, e)


@inlined
def _draw_truth(p: Params, pool: Pool, s: State, e: int, stage: int, row: int) -> None:
    """Set what is true of a stage and what is expected of it."""
    env, q, truth = s.env[e], s.stage[e, stage], s.truth[e, stage]
    given = pool.stage[row]
    sigma = env.noise_sigma
    factor = 1.0
    if sigma > 0.0:
        factor = math.exp(sigma * _normal(env.noise_seed, stage) - 0.5 * sigma * sigma)
    truth.noise = factor
    truth.tool_s = given.tool_s * factor
    truth.output = 0
    q.kv = 0
    if q.kind == LLM:
        most = 0
        for d in range(env.num_devices):
            most = max(most, p.kv_tokens[s.device[e, d].type_idx])
        truth.output = max(1, min(int(given.output * factor + 0.5), most - q.prompt))
        q.kv = q.prompt + truth.output
    if env.oracle != 0:
        q.hidden = 0
        q.expected_output = truth.output
        q.mean_s = truth.tool_s
    q.types = 0
    for t in range(env.num_types):
        expected_s = math.inf
        if q.kind == TASK and p.column[t] >= 0:
            expected_s = pool.duration_s[row, p.column[t]]
            if env.oracle != 0:
                expected_s *= factor
        elif q.kind == LLM and q.kv <= p.kv_tokens[t]:
            expected_s = llm_time_s(p, t, q.prompt, q.expected_output)
        s.expected_s[e, stage, t] = expected_s
        if expected_s < math.inf:
            q.types |= 1 << t


@kernel
def reset_env(p: Params, s: State, e: int) -> None:
    """Derive ranks and put everything but the inputs of one environment into its first state."""
    env = s.env[e]
    env.now_s = 0.0
    env.next_job = 0
    env.next_fault = 0
    env.deciding = 0
    env.changed = 0
    env.num_ready = 0
    env.num_fresh = 0
    env.num_tools = 0
    env.num_started = 0
    env.tool_order = 0
    env.least_kv = 1 << 62
    env.num_ended = 0
    env.num_decisions = 0
    env.in_system = 0
    env.weight_in_system = 0.0
    env.area = 0.0
    env.weighted_area = 0.0
    env.area_until_s = 0.0
    env.good = 0.0
    env.makespan_s = 0.0
    for t in range(s.ready_on.shape[1]):
        s.ready_on[e, t] = 0
    for d in range(env.num_devices):
        v = s.device[e, d]
        v.up = 1
        v.speed = v.base_speed
        v.slots = p.slots[v.type_idx]
        v.kv_capacity = p.kv_tokens[v.type_idx]
        v.busy_s = 0.0
        v.slot_s = 0.0
        v.since_s = 0.0
        v.clock = 0.0
        v.prefill_clock = 0.0
        v.order = 0
        v.released = 0
        clear_device(s, e, d)
    for i in range(env.num_stages):
        q = s.stage[e, i]
        q.status = FUTURE
        q.parents_left = q.pred_stop - q.pred_first
        q.ready_s = math.nan
        q.start_s = math.nan
        q.begin_s = math.nan
        q.due_s = math.nan
        q.finish_s = math.nan
        q.device = NOWHERE
        q.hit = 0
        q.num_restarts = 0
        q.cached_at = -1
    derive_ranks(p, s, e)


@inlined
def derive_ranks(p: Params, s: State, e: int) -> None:
    """Fill means and ranks from expected durations, speeds and links.

    A hidden stage counts in no rank but its own: nobody knows of it before its parents end.
    """
    env = s.env[e]
    n = env.num_devices
    latency_s, s_per_byte = 0.0, 0.0
    for a in range(n):
        for b in range(n):
            if a != b:
                latency_s += s.latency_s[e, a, b]
                s_per_byte += s.s_per_byte[e, a, b]
    pairs = max(1, n * (n - 1))
    latency_s /= pairs
    s_per_byte /= pairs
    for i in range(env.num_stages - 1, -1, -1):
        q = s.stage[e, i]
        if q.kind == TOOL:
            q.least_s = q.mean_s
            q.work_s = 0.0
        else:
            _mean_over_devices(p, s, e, i)
        ahead_s, tail_s = 0.0, 0.0
        q.num_children = 0
        for k in range(q.succ_first, q.succ_stop):
            child = s.stage[e, s.edge[e, k].child]
            if child.hidden != 0:
                continue
            q.num_children += 1
            moving_s = 0.0
            size = s.edge[e, k].data_bytes
            if size > 0.0 and q.kind != TOOL and child.kind != TOOL:
                moving_s = latency_s + size * s_per_byte
            ahead_s = max(ahead_s, moving_s + child.rank_s)
            tail_s = max(tail_s, child.tail_s)
        q.rank_s = q.mean_s + ahead_s
        q.tail_s = q.least_s + tail_s
    for j in range(env.num_jobs):
        job = s.job[e, j]
        job.num_left = job.num_stages
        job.num_ready = 0
        job.num_running = 0
        job.finish_s = math.nan
        rank_s, work_s = 0.0, 0.0
        for i in range(job.first_stage, job.first_stage + job.num_stages):
            if s.stage[e, i].hidden == 0:
                rank_s = max(rank_s, s.stage[e, i].rank_s)
                work_s += s.stage[e, i].work_s
        job.rank_s = rank_s
        job.work_s = work_s
        job.work_left_s = work_s


@inlined
def _mean_over_devices(p: Params, s: State, e: int, i: int) -> None:
    """Set a stage's mean and least duration and its mean device time."""
    env, q = s.env[e], s.stage[e, i]
    total_s, work_s, least_s, count = 0.0, 0.0, math.inf, 0
    for d in range(env.num_devices):
        t = s.device[e, d].type_idx
        if (q.types >> t) & 1 == 0:
            continue
        speed = s.device[e, d].base_speed
        own_s = s.expected_s[e, i, t] / speed
        total_s += own_s
        least_s = min(least_s, own_s)
        count += 1
        if q.kind == LLM:
            batch = typical_batch(p, t, q.prompt, q.expected_output)
            shared_s = (q.expected_output - 1.0) * llm_step_s(p, t, q.prompt, q.expected_output)
            work_s += own_s - shared_s * (1.0 - 1.0 / batch) / speed
        else:
            work_s += own_s
    q.mean_s = total_s / count
    q.least_s = least_s
    q.work_s = work_s / count
