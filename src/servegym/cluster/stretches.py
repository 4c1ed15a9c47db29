"""Stretches of decode steps: what has ended of them, and cutting them short."""

from __future__ import annotations

import math

import numpy as np
from numba import types

from servegym.cluster.blocks import take_for_decodes
from servegym.cluster.entry import CATCH_UP, entry
from servegym.cluster.heap import set_event
from servegym.cluster.jit import helper, inlined
from servegym.cluster.log import log_steps
from servegym.cluster.running import blocks_for_steps
from servegym.cluster.state import DECODE, IDLE, WAKING, Params, State
from servegym.cluster.steptime import decode_span_s, decode_steps_past
from servegym.cluster.watch import see_steps
from servegym.engines import VLLM_PRIORITY

#: Weight of the newest step in the average step time, as in the vLLM plug-in.
STEP_WEIGHT = 0.05


@inlined
def settle_decodes(p: Params, s: State, e: int, r: int, steps: int) -> None:
    """Book `steps` ended steps of the decode stretch in progress."""
    v = s.replica[e, r]
    if steps == 0:
        return
    if steps > 1:
        blocks = blocks_for_steps(p, s, e, r, v.iteration + 1, steps - 1)
        take_for_decodes(p, s, e, r, blocks)
    v.iteration += steps
    tokens = v.num_decodes * steps
    v.kv_tokens += tokens
    v.emitted += tokens
    s.env[e].engine_steps += steps


@inlined
def steps_ended_by(p: Params, s: State, e: int, r: int, time_s: float) -> int:
    """How many steps of the decode stretch in progress have ended by `time_s`."""
    v = s.replica[e, r]
    batch = v.num_decodes
    if batch == 0:  # all that took part were aborted: the step in progress goes on without them
        return 0
    target = (time_s - v.stretch_begin_s) / v.stretch_factor
    kv = v.kv_tokens + batch
    return decode_steps_past(p, v.type_idx, batch, kv, target, v.stretch_steps) - 1


@inlined
def cut_stretch(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Let the decode stretch in progress stop at the end of the step that is running now."""
    v = s.replica[e, r]
    if v.mode != DECODE or v.stretch_steps == 1:
        return
    steps = steps_ended_by(p, s, e, r, now_s) + 1
    if steps < v.stretch_steps:
        v.stretch_steps = steps
        batch = v.num_decodes
        kv = v.kv_tokens + batch
        span = decode_span_s(p, v.type_idx, batch, kv, steps)
        set_event(s, e, r, v.stretch_begin_s + v.stretch_factor * span)


@inlined
def wake(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """A request has joined a queue: start the engine, or let it look at the queue soon."""
    v = s.replica[e, r]
    t = v.type_idx
    if v.mode == IDLE:
        v.mode = WAKING
        if s.due[e, v.event_pos].time_s == math.inf:  # else other ranks are in a step
            set_event(s, e, r, np.nextafter(now_s, math.inf))
    elif v.num_running < p.max_num_seqs[t] and (v.num_waiting == 1 or p.engine[t] == VLLM_PRIORITY):
        # an engine that could not admit the head of its queue cannot admit what comes behind it
        cut_stretch(p, s, e, r, now_s)


@helper
def note_durations(p: Params, s: State, e: int, r: int, steps: int, end_s: float) -> None:
    """Take the next `steps` steps of the stretch in progress, over at `end_s`, into the average."""
    v = s.replica[e, r]
    f = s.forming[e, r]
    before_s = 0.0
    for i in range(steps):
        duration_s = end_s - v.stretch_begin_s
        if steps > 1:
            kv_tokens = v.kv_tokens + v.num_decodes
            after_s = (
                decode_span_s(p, v.type_idx, v.num_decodes, kv_tokens, i + 1) * v.stretch_factor
            )
            duration_s = after_s - before_s
            before_s = after_s
        if f.step_s == 0.0:
            f.step_s = duration_s
        f.step_s += STEP_WEIGHT * (duration_s - f.step_s)


@entry(CATCH_UP, types.void, types.int64, types.int64, types.float64)
def catch_up(p: Params, s: State, e: int, r: int, now_s: float) -> None:
    """Book the ended steps of a decode stretch, so that the prefix cache shows what they evicted.

    The stretch goes on from the step in progress, and ends when it would have ended.
    """
    v = s.replica[e, r]
    if v.mode != DECODE or v.stretch_steps == 1:
        return
    steps = steps_ended_by(p, s, e, r, now_s)
    if steps == 0:
        return
    kv = v.kv_tokens + v.num_decodes
    span = decode_span_s(p, v.type_idx, v.num_decodes, kv, steps)
    end_s = v.stretch_begin_s + v.stretch_factor * span
    log_steps(p, s, e, r, end_s, steps, 0)
    see_steps(p, s, e, r, end_s, steps)
    if p.engine[v.type_idx] == VLLM_PRIORITY:
        note_durations(p, s, e, r, steps, end_s)
    settle_decodes(p, s, e, r, steps)
    take_for_decodes(p, s, e, r, s.phase[e, r, v.iteration % p.block_size])
    v.stretch_begin_s = end_s
    v.stretch_steps -= steps
