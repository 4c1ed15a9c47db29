"""Jobs into environments: what is true of them, what is expected, and the state before time 0."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.rng import mix64, uniform
from servegym.workflow.online.engine import clear_device
from servegym.workflow.online.expected import derive_ranks, llm_time_s
from servegym.workflow.online.pool import Pool
from servegym.workflow.online.state import FUTURE, LLM, NOWHERE, TASK, Params, State


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
def _normal(noise_seed: np.uint64, stage: int) -> float:
    base = mix64(noise_seed ^ mix64(np.uint64(stage) + np.uint64(0x9E3779B97F4A7C15)))
    u, w = uniform(base), uniform(base + np.uint64(0x9E3779B97F4A7C15))
    return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * w)
