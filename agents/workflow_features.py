"""What a learned scheduler of jobs looks at: numbers for each (ready stage, device) pair.

Compiled, and without PyTorch: the same code describes decisions in training and in evaluation.
Times are stated in units of `tau_s`, the mean duration of a stage in training, as
`log1p(8 x / tau)`.
"""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.typing import FloatArray
from servegym.workflow.online.state import LLM, TOOL
from servegym.workflow.online.view import (
    View,
    can_run,
    data_there_s,
    duration_s,
    free_s,
    is_visible,
    move_s,
    prefix_hit_tokens,
)

#: Goes up with any change of the features below.
SCHEMA_VERSION = 1
#: Of a pair of stage and device, in order.
PAIR_FEATURES = (
    "one",
    # the stage and its job
    "job_work_left",
    "rank",
    "mean",
    "job_age",
    "slack",  # time to spare over the longest way to the end, within -3..3; 0 without deadline
    "job_num_running",  # log1p
    "job_runs",  # 0 or 1
    "job_num_ready",  # log1p
    "jobs_in_system",  # log1p
    "waited",
    "rank_share",  # longest way to the end over that of the whole job
    "next_queue",  # least work that waits for a device that a child can run on
    "stages_behind",  # log1p of the number of stages on the longest way behind it
    # the device
    "finish",  # expected end from now, beside what runs and waits there
    "regret",  # the same, less that on the best device, busy ones too
    "is_best",
    "prefill_to_others",  # decodes that its prompt would delay, times how long
    "prompts_waiting",
    "num_running",  # log1p
    "is_idle",
    "slots_used",
    "prefix_hit",  # share of the prompt
    "kv_used",
    "prefill",
    "num_decodes",  # log1p
    "data",  # until its data is there
    "queue",  # work of ready stages that can run there, each shared out to all its devices
    "load",  # the same of all known stages that have not started
)
NUM_PAIR_FEATURES = len(PAIR_FEATURES)
#: Of a stage for message passing: what never changes.
STAGE_FEATURES = (
    "is_llm",
    "is_tool",
    "mean",
    "work",
    "prompt",  # log1p of thousands of tokens
    "output",  # log1p of hundreds of tokens, expected
    "rank_share",
    "num_children",  # log1p
)
NUM_STAGE_FEATURES = len(STAGE_FEATURES)
#: Columns of a device's memory that `describe_devices` and `estimate_finishes` fill.
FINISH, QUEUE, LOAD, NUM_DEVICE_COLUMNS = 0, 1, 2, 3


@inlined
def in_units(x_s: float, tau_s: float) -> float:
    """State a time in units of a typical stage, small ones apart and large ones together."""
    return math.log1p(8.0 * max(0.0, x_s) / tau_s)


@inlined
def describe_stage(w: View, v: int, tau_s: float, out: FloatArray, at: int) -> None:
    """Write `STAGE_FEATURES` of a known stage to `out[at:]`."""
    q = w.stage[v]
    job = w.job[q.job]
    children = 0
    for i in range(q.succ_first, q.succ_stop):
        children += w.stage[w.edge[i].child].hidden == 0
    out[at] = q.kind == LLM
    out[at + 1] = q.kind == TOOL
    out[at + 2] = in_units(q.mean_s, tau_s)
    out[at + 3] = in_units(q.work_s, tau_s)
    out[at + 4] = math.log1p(q.prompt / 1000.0)
    out[at + 5] = math.log1p(q.expected_output / 100.0)
    out[at + 6] = min(1.0, q.rank_s / max(job.rank_s, 1e-12))
    out[at + 7] = math.log1p(children)


@inlined
def describe_devices(w: View, device_memory: FloatArray) -> None:
    """Fill the queue and the load of every device, seconds."""
    num_devices = w.env[0].num_devices
    for d in range(num_devices):
        device_memory[d, QUEUE] = 0.0
        device_memory[d, LOAD] = 0.0
    for i in range(w.env[0].num_ready):
        _share_out(w, w.ready[i], device_memory, QUEUE)
    for j in range(w.env[0].next_job):
        job = w.job[j]
        if job.finish_s == job.finish_s:
            continue  # has ended
        for v in range(job.first_stage, job.first_stage + job.num_stages):
            if math.isnan(w.stage[v].start_s) and is_visible(w, v):
                _share_out(w, v, device_memory, LOAD)


@inlined
def _share_out(w: View, v: int, device_memory: FloatArray, column: int) -> None:
    able = 0
    for d in range(w.env[0].num_devices):
        able += can_run(w, v, d)
    if able > 0:
        for d in range(w.env[0].num_devices):
            if can_run(w, v, d):
                device_memory[d, column] += w.stage[v].work_s / able


@inlined
def estimate_finishes(w: View, v: int, device_memory: FloatArray) -> float:
    """Fill when a ready stage would end on each device that can run it, seconds from now.

    From when the device is expected to have a free slot, and the stage's data.

    Returns:
        The least of them.
    """
    now_s = w.env[0].now_s
    least_s = math.inf
    for d in range(w.env[0].num_devices):
        device_memory[d, FINISH] = math.inf
        if can_run(w, v, d):
            from_s = max(free_s(w, d) + move_s(w, v, d), data_there_s(w, v, d)) - now_s
            device_memory[d, FINISH] = from_s + duration_s(w, v, d)
            least_s = min(least_s, device_memory[d, FINISH])
    return least_s


@inlined
def describe_pair(
    w: View,
    v: int,
    d: int,
    least_s: float,
    stages_behind: float,
    tau_s: float,
    device_memory: FloatArray,
    out: FloatArray,
    at: int,
) -> None:
    """Write `PAIR_FEATURES` to `out[at:]`; devices and finishes must have been filled."""
    q, x = w.stage[v], w.device[d]
    job = w.job[q.job]
    now_s = w.env[0].now_s
    age_s = now_s - job.arrival_s
    slack = 0.0
    if job.deadline_s < math.inf:
        slack = (job.deadline_s - age_s - q.rank_s) / max(q.rank_s, 1e-9)
        slack = min(3.0, max(-3.0, slack))
    next_s = math.inf
    for i in range(q.succ_first, q.succ_stop):
        child = w.edge[i].child
        if w.stage[child].hidden == 0 and w.stage[child].kind != TOOL:
            for k in range(w.env[0].num_devices):
                if can_run(w, child, k):
                    next_s = min(next_s, device_memory[k, QUEUE])
    prefill_s, hit = 0.0, 0.0
    if q.kind == LLM:
        cached = prefix_hit_tokens(w, v, d)
        hit = cached / max(1, q.prompt)
        prefill_s = (q.prompt - cached) * w.prefill_s_per_token[x.type_idx] / x.speed
    waiting_s = x.waiting_tokens * w.prefill_s_per_token[x.type_idx] / x.speed
    finish_s = device_memory[d, FINISH]
    out[at] = 1.0
    out[at + 1] = in_units(job.work_left_s, tau_s)
    out[at + 2] = in_units(q.rank_s, tau_s)
    out[at + 3] = in_units(q.mean_s, tau_s)
    out[at + 4] = in_units(age_s, tau_s)
    out[at + 5] = slack
    out[at + 6] = math.log1p(job.num_running)
    out[at + 7] = job.num_running > 0
    out[at + 8] = math.log1p(job.num_ready)
    out[at + 9] = math.log1p(w.env[0].in_system)
    out[at + 10] = in_units(now_s - q.ready_s, tau_s)
    out[at + 11] = min(1.0, q.rank_s / max(job.rank_s, 1e-12))
    out[at + 12] = 0.0
    if next_s < math.inf:
        out[at + 12] = in_units(next_s, tau_s)
    out[at + 13] = math.log1p(stages_behind)
    out[at + 14] = in_units(finish_s, tau_s)
    out[at + 15] = in_units(finish_s - least_s, tau_s)
    out[at + 16] = finish_s <= least_s + 1e-9
    out[at + 17] = in_units(x.num_decodes * prefill_s, tau_s)
    out[at + 18] = in_units(waiting_s, tau_s)
    out[at + 19] = math.log1p(x.num_running)
    out[at + 20] = x.num_running == 0
    out[at + 21] = x.num_running / max(1, x.slots)
    out[at + 22] = hit
    out[at + 23] = x.kv_reserved / max(1, x.kv_capacity)
    out[at + 24] = in_units(prefill_s, tau_s)
    out[at + 25] = math.log1p(x.num_decodes)
    out[at + 26] = in_units(data_there_s(w, v, d) - now_s, tau_s)
    out[at + 27] = in_units(device_memory[d, QUEUE], tau_s)
    out[at + 28] = in_units(device_memory[d, LOAD], tau_s)
