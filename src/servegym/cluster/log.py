"""Writing the event log, the step log and the inter-token histogram from compiled code."""

from __future__ import annotations

import math

from numba import njit

from servegym.cluster.state import ITL_BINS_PER_DECADE, ITL_FIRST_S, Params, State


@njit(cache=True, nogil=True, inline="always")
def log_event(
    p: Params, s: State, e: int, time_s: float, kind: int, request: int, replica: int, value: float
) -> None:
    """Append one event, if the run is recorded."""
    if p.record:
        i = s.env[e].log_len
        s.log[e, i].time_s = time_s
        s.log[e, i].kind = kind
        s.log[e, i].request = request
        s.log[e, i].replica = replica
        s.log[e, i].value = value
        s.env[e].log_len = i + 1


@njit(cache=True, nogil=True)
def log_steps(
    p: Params, s: State, e: int, r: int, end_s: float, num_steps: int, prefill: int
) -> None:
    """Append a stretch of ended steps, and count its inter-token times.

    In a stretch of decode steps all are counted with their mean duration: they differ by the
    attention to the few tokens that were added meanwhile.
    """
    if not p.record or num_steps == 0:
        return
    i = s.env[e].step_len
    s.steps[e, i].begin_s = s.replica[e, r].seg_begin_s
    s.steps[e, i].end_s = end_s
    s.steps[e, i].replica = r
    s.steps[e, i].num_steps = num_steps
    s.steps[e, i].num_decodes = s.replica[e, r].num_decodes
    s.steps[e, i].prefill_tokens = prefill
    s.steps[e, i].num_waiting = s.replica[e, r].num_waiting
    s.steps[e, i].used_blocks = p.num_blocks[s.replica[e, r].type_idx] - s.replica[e, r].free_blocks
    s.env[e].step_len = i + 1
    if s.replica[e, r].num_decodes > 0:
        mean_s = (end_s - s.replica[e, r].seg_begin_s) / num_steps
        count_itl(p, s, e, mean_s, num_steps * s.replica[e, r].num_decodes)


@njit(cache=True, nogil=True)
def count_itl(p: Params, s: State, e: int, gap_s: float, count: int) -> None:
    """Count `count` inter-token times of `gap_s` seconds."""
    if p.record and gap_s > 0.0:
        i = int(math.floor(math.log10(gap_s / ITL_FIRST_S) * ITL_BINS_PER_DECADE))
        s.itl_count[e, min(max(i, 0), s.itl_count.shape[1] - 1)] += count
