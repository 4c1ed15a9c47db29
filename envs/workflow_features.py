"""What `servegym/Workflow-v0` observes: every number with its range, unit and meaning."""

from __future__ import annotations

from typing import NamedTuple

from servegym.policy.contract import NO_BOUND


class Column(NamedTuple):
    """One number of the observation."""

    name: str
    low: float
    high: float
    unit: str
    meaning: str


STAGE_COLUMNS: tuple[Column, ...] = (
    Column("present", 0, 1, "-", "1 if the row holds a stage"),
    Column("is_llm", 0, 1, "-", "1 for an LLM request, 0 for a task"),
    Column("mean_s", 0, NO_BOUND, "s", "expected duration, mean over devices that can run it"),
    Column("rank_s", 0, NO_BOUND, "s", "upward rank: longest way to the end of its job"),
    Column("tail_s", 0, NO_BOUND, "s", "the same with the fastest devices and nothing to move"),
    Column("work_s", 0, NO_BOUND, "s", "device time, a batch counted as shared out"),
    Column("prompt_tokens", 0, NO_BOUND, "tokens", "of an LLM request"),
    Column("expected_output_tokens", 0, NO_BOUND, "tokens", "of an LLM request"),
    Column("waiting_s", 0, NO_BOUND, "s", "since it became ready"),
    Column("num_children", 0, NO_BOUND, "stages", "that are known and wait for it"),
    Column("num_restarts", 0, NO_BOUND, "-", "how often a failure undid it"),
    Column("job_age_s", 0, NO_BOUND, "s", "since its job arrived"),
    Column("job_work_left_s", 0, NO_BOUND, "s", "device time of the job's known stages"),
    Column("job_num_ready", 0, NO_BOUND, "stages", "of its job that are ready"),
    Column("job_num_running", 0, NO_BOUND, "stages", "of its job on devices"),
    Column("job_weight", 0, NO_BOUND, "-", "worth of its job"),
    Column("slack_s", -NO_BOUND, NO_BOUND, "s", "to the deadline, less rank_s; no deadline: max"),
)
PAIR_COLUMNS: tuple[Column, ...] = (
    Column("can_start", 0, 1, "-", "1 if the stage can start on the device now"),
    Column("duration_s", 0, NO_BOUND, "s", "expected, from its beginning; 0 if it can never run"),
    Column("delay_s", 0, NO_BOUND, "s", "till data and move delay let it begin, if started now"),
    Column("prefix_hit_tokens", 0, NO_BOUND, "tokens", "of the prompt in the device's cache"),
)
DEVICE_COLUMNS: tuple[Column, ...] = (
    Column("present", 0, 1, "-", "1 if the row holds a device"),
    Column("up", 0, 1, "-", "1 if it has not failed"),
    Column("is_engine", 0, 1, "-", "1 for an LLM engine"),
    Column("speed", 0, NO_BOUND, "-", "factor on its type's speed"),
    Column("slots", 0, NO_BOUND, "stages", "at the same time"),
    Column("num_running", 0, NO_BOUND, "stages", "that hold a slot"),
    Column("kv_use", 0, 1, "-", "share of the KV capacity that is reserved"),
    Column("waiting_tokens", 0, NO_BOUND, "tokens", "prompt tokens without their prefill"),
    Column("free_in_s", 0, NO_BOUND, "s", "till a slot is expected to be free"),
)
GLOBAL_COLUMNS: tuple[Column, ...] = (
    Column("jobs_in_system", 0, NO_BOUND, "jobs", "that arrived and have not ended"),
    Column("num_ready", 0, NO_BOUND, "stages", "ready, whether shown or not"),
    Column("num_started", 0, NO_BOUND, "stages", "on devices, and calls of tools"),
    Column("since_arrival_s", 0, NO_BOUND, "s", "since the last job arrived"),
)
NODE_COLUMNS: tuple[Column, ...] = (
    Column("is_blocked", 0, 1, "-", "1 if a parent has not ended"),
    Column("is_ready", 0, 1, "-", "1 if it waits for a device"),
    Column("is_started", 0, 1, "-", "1 if it runs"),
    Column("is_llm", 0, 1, "-", "1 for an LLM request"),
    Column("is_tool", 0, 1, "-", "1 for a call of a tool"),
    Column("mean_s", 0, NO_BOUND, "s", "expected duration, mean over devices that can run it"),
    Column("work_s", 0, NO_BOUND, "s", "device time, a batch counted as shared out"),
    Column("rank_s", 0, NO_BOUND, "s", "upward rank"),
    Column("due_in_s", 0, NO_BOUND, "s", "till its expected end, if it runs"),
    Column("job_age_s", 0, NO_BOUND, "s", "since its job arrived"),
    Column("job_work_left_s", 0, NO_BOUND, "s", "device time of the job's known stages"),
)
