"""The online simulator's arrays: constants shared by all environments, and state of each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.by_reference import pass_by_reference
from servegym.cluster.state import Params as EngineParams
from servegym.typing import FloatArray, IntArray

Records = NDArray[np.void]

# Stage status
FUTURE, BLOCKED, READY, STARTED, ENDED = range(5)
# Why `advance` came back
DECISION, DONE, STUCK = range(3)
# What changes hands when a device pays the move delay
MOVE_NEVER, MOVE_JOB, MOVE_TEMPLATE = range(3)
# Kinds of stages, as in `workflow.job.StageKind`
TASK, LLM, TOOL = range(3)
#: The action that is no start.
WAIT = -1
#: Where something has no device, no job or no template.
NOWHERE = -1


class Params(NamedTuple):
    """What does not change during a run; axis T: device types."""

    engine: EngineParams  # step costs and limits; axis: engine types
    engine_idx: IntArray  # [T] place in `engine`, -1 for task devices
    column: IntArray  # [T] place in the durations of tasks, -1 for engines
    slots: IntArray  # [T] stages at the same time
    kv_tokens: IntArray  # [T] KV capacity, 0 for task devices
    typical_batch: IntArray  # [T] sequences an engine is expected to run together
    prefill_s_per_token: FloatArray  # [T] at a full token budget
    step_s_per_seq: FloatArray  # [T] what one more sequence adds to a decode step
    step_s_per_kv_token: FloatArray  # [T] what one more token in its context adds
    move_delay_s: float
    move_on: int  # MOVE_NEVER, MOVE_JOB or MOVE_TEMPLATE


#: What a scheduler may know of one stage. Small, and what is read together is near each other:
#: hundreds of environments do not fit in a cache.
STAGE_DTYPE = np.dtype(
    [
        # where it is, which its children ask too
        ("finish_s", "f8"),
        ("cached_at", "i8"),  # the engine's `released` before it ended there, -1 before
        ("device", "i4"),
        ("kind", "i1"),
        ("status", "i1"),
        ("hidden", "i2"),  # two bytes: records without padding can be compared byte by byte
        ("parents_left", "i4"),
        # inputs
        ("job", "i4"),
        ("types", "i8"),  # bit t: device type t can run it
        ("prompt", "i4"),  # tokens
        ("kv", "i4"),  # tokens an engine must have free: prompt and true output, for `can_start`
        ("pred_first", "i4"),  # places pred_first..pred_stop-1 of `pred` name edges that enter it
        ("pred_stop", "i4"),
        # derived from expected durations, means over the devices that can run it
        ("mean_s", "f8"),  # duration
        ("rank_s", "f8"),  # longest way to the end of the job, mean durations and transfers
        ("tail_s", "f8"),  # longest way to the end of the job, shortest durations
        ("work_s", "f8"),  # device time, a batch counted as shared out
        ("expected_output", "f8"),  # tokens
        ("ready_s", "f8"),
        ("num_children", "i4"),  # that are not hidden
        ("num_restarts", "i4"),
        ("hit", "i4"),  # prompt tokens that needed no prefill
        ("succ_first", "i4"),  # edges succ_first..succ_stop-1 of `edge` leave it
        ("succ_stop", "i4"),
        ("label", "i4"),
        ("start_s", "f8"),  # when a device was given to it
        ("begin_s", "f8"),  # when that had its data and began
        ("due_s", "f8"),  # when it is expected to end, from the beginning
        ("least_s", "f8"),  # shortest duration
    ],
    align=True,
)
#: What a scheduler may not know of it.
TRUTH_DTYPE = np.dtype(
    [
        ("noise", "f8"),  # factor on durations of tasks
        ("tool_s", "f8"),
        ("output", "i8"),  # tokens
    ],
    align=True,
)
JOB_DTYPE = np.dtype(
    [
        # inputs
        ("first_stage", "i8"),
        ("num_stages", "i8"),
        ("template", "i8"),
        ("arrival_s", "f8"),
        ("deadline_s", "f8"),  # after the arrival
        ("weight", "f8"),
        # derived: of the stages visible at the arrival
        ("rank_s", "f8"),
        ("work_s", "f8"),
        # progress
        ("num_left", "i8"),  # stages that have not ended, hidden ones too: not for schedulers
        ("num_ready", "i8"),
        ("num_running", "i8"),  # on devices
        ("work_left_s", "f8"),  # of visible stages that have not ended
        ("finish_s", "f8"),
    ],
    align=True,
)
DEVICE_DTYPE = np.dtype(
    [
        # inputs
        ("type_idx", "i8"),
        ("base_speed", "f8"),
        # what a scheduler sees
        ("up", "i8"),
        ("speed", "f8"),
        ("slots", "i8"),
        ("num_running", "i8"),
        ("kv_capacity", "i8"),
        ("kv_reserved", "i8"),
        ("waiting_tokens", "i8"),  # prompt tokens whose prefill has not ended
        ("last_job", "i8"),
        ("last_template", "i8"),
        ("busy_s", "f8"),  # time with at least one stage, up to since_s
        ("slot_s", "f8"),  # integral of num_running, up to since_s
        # engine
        ("since_s", "f8"),  # when clock, kv_tokens and prefill_left_s were right
        ("clock", "f8"),  # decode steps, or seconds of work of a task device
        ("step_s", "f8"),  # length of one unit of `clock` at speed 1
        ("num_decodes", "i8"),
        ("kv_tokens", "f8"),  # that the decodes attend to
        ("prefilling", "i8"),  # stages of `queue` in the prefill in progress
        ("prefill_left_s", "f8"),  # at speed 1
        ("prefill_clock", "f8"),  # `clock` at its end
        ("wake_s", "f8"),  # when the next prefill is put together
        ("queue_first", "i8"),
        ("queue_len", "i8"),
        ("num_ends", "i8"),
        ("num_fetches", "i8"),
        ("order", "i8"),  # of entering a heap, for equal keys
        ("released", "i8"),  # KV tokens of all stages that ended here
        ("evicted", "i8"),  # those before this position are no longer cached
        ("due_s", "f8"),  # next event
    ],
    align=True,
)
ENV_DTYPE = np.dtype(
    [
        ("num_jobs", "i8"),
        ("num_stages", "i8"),
        ("num_edges", "i8"),
        ("num_devices", "i8"),
        ("num_types", "i8"),
        ("num_faults", "i8"),
        ("noise_seed", "u8"),
        ("noise_sigma", "f8"),
        ("deadline_scale", "f8"),
        ("oracle", "i8"),  # expected values are the true ones, nothing is hidden
        ("asks_when_ready", "i8"),  # decisions are due for new ready stages in any case
        ("now_s", "f8"),
        ("next_job", "i8"),
        ("next_fault", "i8"),
        ("deciding", "i8"),
        ("changed", "i8"),  # whether something happened since the last WAIT
        ("refused", "i8"),  # action of a rule that was not allowed
        ("num_ready", "i8"),
        ("num_fresh", "i8"),
        ("num_tools", "i8"),
        ("num_started", "i8"),  # stages on devices or calls of tools
        ("tool_order", "i8"),
        ("least_kv", "i8"),  # no ready LLM stage needs less
        ("num_ended", "i8"),  # jobs
        ("num_decisions", "i8"),
        ("in_system", "i8"),
        ("weight_in_system", "f8"),
        ("area", "f8"),  # integral of in_system, job-seconds
        ("weighted_area", "f8"),
        ("area_until_s", "f8"),
        ("good", "f8"),  # weight of jobs that ended by their deadline
        ("makespan_s", "f8"),  # end of the last stage that has ended
    ],
    align=True,
)
EDGE_DTYPE = np.dtype(
    [("parent", "i4"), ("child", "i4"), ("data_bytes", "f8"), ("shared", "i8")], align=True
)
#: Heap entry: by key, then by order of entering.
ENTRY_DTYPE = np.dtype([("key", "f8"), ("order", "i8"), ("stage", "i8")], align=True)


class State(NamedTuple):
    """What changes; axes: E environments, N stages, J jobs, D devices, S slots, and as noted."""

    stage: Records  # STAGE_DTYPE[E, N]
    truth: Records  # TRUTH_DTYPE[E, N]
    expected_s: FloatArray  # [E, N, T] duration at speed 1; inf where it cannot run
    job: Records  # JOB_DTYPE[E, J]
    device: Records  # DEVICE_DTYPE[E, D]
    env: Records  # ENV_DTYPE[E]
    edge: Records  # EDGE_DTYPE[E, M]; by parent
    pred: IntArray  # [E, M] edges by child
    latency_s: FloatArray  # [E, D, D] from, to
    s_per_byte: FloatArray  # [E, D, D]
    ready: IntArray  # [E, N] ready stages by falling rank, then by number
    fresh: IntArray  # [E, N] those that became ready since the last decision, in that order
    ready_on: IntArray  # [E, T] ready stages that the type can run
    running: IntArray  # [E, D, S] stages that hold a slot, in order of start
    running_due_s: FloatArray  # [E, D, S] `due_s` of each
    queue: IntArray  # [E, D, S] ring of stages to prefill
    ends: Records  # ENTRY_DTYPE[E, D, S] heap; key: `clock` at the end
    fetches: Records  # ENTRY_DTYPE[E, D, S] heap; key: when the data is there
    tools: Records  # ENTRY_DTYPE[E, N] heap; key: when the call ends
    fault: Records  # cluster.state.FAULT_DTYPE[E, F]; `replica` is the device


pass_by_reference(Params)
pass_by_reference(State)
