"""Writing the event log, the step log and the inter-token histogram from compiled code."""

from __future__ import annotations

import math

from servegym.cluster.jit import helper, inlined
from servegym.cluster.state import ITL_BINS_PER_DECADE, ITL_FIRST_S, PREFILL, Params, State


@inlined
def log_event(
    p: Params,
    s: State,
    e: int,
    time_s: float,
    kind: int,
    request: int,
    replica: int,
    value: float,
) -> None:
    """Append one event, if the run is recorded."""
    env = s.env[e]
    if p.record:
        i = env.log_len
        s.log[e, i].time_s = time_s
        s.log[e, i].kind = kind
        s.log[e, i].request = request
        s.log[e, i].replica = replica
        s.log[e, i].value = value
        env.log_len = i + 1


@inlined
def log_steps(
    p: Params, s: State, e: int, r: int, end_s: float, num_steps: int, prefill: int
) -> None:
    """Append a stretch of ended steps, and count its inter-token times.

    In a stretch of decode steps all are counted with their mean duration: they differ by the
    attention to the few tokens that were added meanwhile.
    """
    v = s.replica[e, r]
    env = s.env[e]
    if not p.record or num_steps == 0:
        return
    i = env.step_len
    s.steps[e, i].begin_s = v.stretch_begin_s
    s.steps[e, i].end_s = end_s
    s.steps[e, i].replica = r
    s.steps[e, i].num_steps = num_steps
    batch = 0 if v.mode == PREFILL else v.num_decodes
    s.steps[e, i].num_decodes = batch
    s.steps[e, i].prefill_tokens = prefill
    s.steps[e, i].num_waiting = v.num_waiting
    s.steps[e, i].used_blocks = p.num_blocks[v.type_idx] - v.free_blocks
    env.step_len = i + 1
    if batch > 0:
        mean_s = (end_s - v.stretch_begin_s) / num_steps
        if v.stalled > 0:
            _count_after_stall(p, s, e, r, mean_s)
            num_steps -= 1
        count_itl(p, s, e, mean_s, num_steps * batch)


@helper
def _count_after_stall(p: Params, s: State, e: int, r: int, step_s: float) -> None:
    """Count the inter-token times of a decode step that others' prefills came before."""
    v = s.replica[e, r]
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        if q.join_iter >= 0:
            count_itl(p, s, e, v.stretch_begin_s - q.last_token_s + step_s, 1)
        request = q.next_request
    v.stalled = 0


@inlined
def count_itl(p: Params, s: State, e: int, gap_s: float, count: int) -> None:
    """Count `count` inter-token times of `gap_s` seconds."""
    if p.record and gap_s > 0.0:
        i = math.floor(math.log10(gap_s / ITL_FIRST_S) * ITL_BINS_PER_DECADE)
        s.itl_count[e, min(max(i, 0), s.itl_count.shape[1] - 1)] += count
