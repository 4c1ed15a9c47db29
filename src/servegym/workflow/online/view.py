"""What a scheduler sees of one environment, and what follows from it."""

from __future__ import annotations

import math
from typing import NamedTuple

from servegym.cluster.jit import inlined
from servegym.typing import FloatArray, IntArray
from servegym.workflow.online.state import (
    LLM,
    MOVE_JOB,
    MOVE_NEVER,
    MOVE_TEMPLATE,
    NOWHERE,
    READY,
    TASK,
    Params,
    Records,
    State,
)


class View(NamedTuple):
    """Arrays of one environment without what is hidden; see `state` for the records.

    Rows of jobs that have not arrived, and of hidden stages whose parents have not ended
    (`is_visible`), are not to be read, nor is `kv` of a stage but by `can_start`.
    """

    env: Records  # ENV_DTYPE[1]
    stage: Records  # STAGE_DTYPE[N]
    job: Records  # JOB_DTYPE[J]; the first env.next_job have arrived
    device: Records  # DEVICE_DTYPE[D]
    expected_s: FloatArray  # [N, T] durations at speed 1; inf where a stage cannot run
    edge: Records  # EDGE_DTYPE[M]; by parent
    pred: IntArray  # [M] edges by child
    latency_s: FloatArray  # [D, D]
    s_per_byte: FloatArray  # [D, D]
    ready: IntArray  # [N]; the first env.num_ready, by falling rank
    fresh: IntArray  # [N]; the first env.num_fresh, in the order in which they became ready
    running: IntArray  # [D, S]; the first device.num_running of each row, in order of start
    running_due_s: FloatArray  # [D, S] when each is expected to end
    typical_batch: IntArray  # [T] sequences that `expected_s` of LLM stages is stated for
    prefill_s_per_token: FloatArray  # [T] at a full token budget
    step_s_per_seq: FloatArray  # [T] what one more sequence adds to a decode step
    step_s_per_kv_token: FloatArray  # [T] what one more token in its context adds
    move_delay_s: float
    move_on: int


def look(p: Params, s: State, e: int) -> View:
    """Return what a scheduler sees of one environment; arrays, not copies."""
    return View(
        s.env[e : e + 1],
        s.stage[e],
        s.job[e],
        s.device[e],
        s.expected_s[e],
        s.edge[e],
        s.pred[e],
        s.latency_s[e],
        s.s_per_byte[e],
        s.ready[e],
        s.fresh[e],
        s.running[e],
        s.running_due_s[e],
        p.typical_batch,
        p.prefill_s_per_token,
        p.step_s_per_seq,
        p.step_s_per_kv_token,
        p.move_delay_s,
        p.move_on,
    )


#: The same, for kernels.
view = inlined(look)


@inlined
def can_start(w: View, stage: int, d: int) -> bool:
    """Whether a ready stage could start on a device now."""
    v, q = w.device[d], w.stage[stage]
    if v.up == 0 or v.num_running >= v.slots or (q.types >> v.type_idx) & 1 == 0:
        return False
    return q.kind != LLM or v.kv_reserved + q.kv <= v.kv_capacity


@inlined
def can_run(w: View, stage: int, d: int) -> bool:
    """Whether a device is of a type that can run a stage, and up."""
    return w.device[d].up != 0 and (w.stage[stage].types >> w.device[d].type_idx) & 1 != 0


@inlined
def is_visible(w: View, stage: int) -> bool:
    """Whether a stage of a job that has arrived is known."""
    return w.stage[stage].hidden == 0 or w.stage[stage].status >= READY


@inlined
def data_there_s(w: View, stage: int, d: int) -> float:
    """When all data of a ready stage is on a device, seconds; data sets out when a parent ends."""
    q = w.stage[stage]
    latest_s = 0.0
    for k in range(q.pred_first, q.pred_stop):
        i = w.pred[k]
        size = w.edge[i].data_bytes
        u = w.edge[i].parent
        at = w.stage[u].device
        if size > 0.0 and at != NOWHERE and at != d:
            there_s = w.stage[u].finish_s + w.latency_s[at, d] + size * w.s_per_byte[at, d]
            latest_s = max(latest_s, there_s)
    return latest_s


@inlined
def move_s(w: View, stage: int, d: int) -> float:
    """Move delay that a device would pay for a stage, after what was given to it last."""
    q, v = w.stage[stage], w.device[d]
    if q.kind != TASK or w.move_on == MOVE_NEVER:
        return 0.0
    if w.move_on == MOVE_JOB and v.last_job == q.job:
        return 0.0
    if w.move_on == MOVE_TEMPLATE and v.last_template == w.job[q.job].template:
        return 0.0
    return w.move_delay_s


@inlined
def prefix_hit_tokens(w: View, stage: int, d: int) -> int:
    """Leading prompt tokens of a stage that a parent has left in the cache of engine `d`.

    Ended stages lie in the free KV memory in order of their ends; reserving memory overwrites the
    oldest. At least one token is always computed.
    """
    q = w.stage[stage]
    found = 0
    for k in range(q.pred_first, q.pred_stop):
        i = w.pred[k]
        u = w.edge[i].parent
        if (
            w.edge[i].shared > found
            and w.stage[u].device == d
            and w.stage[u].kind == LLM
            and w.stage[u].cached_at >= w.device[d].evicted
        ):
            found = w.edge[i].shared
    return min(found, q.prompt - 1)


@inlined
def duration_s(w: View, stage: int, d: int) -> float:
    """Expected duration of a stage on a device from its beginning; inf where it cannot run.

    Of an LLM stage beside those that run on the engine now, behind the prompts that wait there,
    with what is cached: `expected_s`, which is that beside a typical batch, and the difference
    between the two batches at the engine's slopes.
    """
    q, v = w.stage[stage], w.device[d]
    t = v.type_idx
    expected_s = w.expected_s[stage, t]
    if q.kind == LLM and expected_s < math.inf:
        tokens = q.prompt + q.expected_output
        batch = max(1, min(w.typical_batch[t], int(v.kv_capacity / tokens)))
        step_s = w.step_s_per_seq[t] * (v.num_running + 1 - batch)
        step_s += w.step_s_per_kv_token[t] * (v.kv_reserved - (batch - 1) * tokens)
        prefill = v.waiting_tokens - prefix_hit_tokens(w, stage, d)
        here_s = expected_s + (q.expected_output - 1.0) * step_s
        # lines cut short what is far from them: no stage is ten times as fast as expected
        expected_s = max(here_s, 0.1 * expected_s) + prefill * w.prefill_s_per_token[t]
    return expected_s / v.speed


@inlined
def free_s(w: View, d: int) -> float:
    """When a device is expected to have a free slot; now if it has one."""
    v = w.device[d]
    now_s = w.env[0].now_s
    if v.num_running < v.slots:
        return now_s
    first_s = math.inf
    for i in range(v.num_running):
        first_s = min(first_s, w.running_due_s[d, i])
    return max(first_s, now_s)
