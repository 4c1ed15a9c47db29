"""What is expected of stages: durations beside a typical batch, means over devices, ranks."""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.cluster.steptime import decode_span_s, dense_s, prefill_s
from servegym.workflow.online.state import LLM, TOOL, Params, State


@inlined
def llm_time_s(p: Params, t: int, prompt: int, output: float) -> float:
    """Expected duration of an LLM stage on an engine type, beside a typical batch of its like."""
    k = p.engine_idx[t]
    budget = p.engine.max_num_batched_tokens[k]
    total_s, done = 0.0, 0
    while done < prompt:
        chunk = min(budget, prompt - done)
        step_s = dense_s(p.engine, k, chunk) + prefill_s(p.engine, k, chunk, done)
        total_s += max(step_s, p.engine.eager_s[k])
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
