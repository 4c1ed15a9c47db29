"""What comes out of a run: stages, jobs and devices as records."""

from __future__ import annotations

import numpy as np

STAGE_OUTCOME_DTYPE = np.dtype(
    [
        ("job", "i8"),  # in order of arrival
        ("stage", "i8"),  # within the job
        ("kind", "i8"),  # `workflow.job.StageKind`
        ("label", "i8"),
        ("device", "i8"),  # where it ended; -1 for tool calls
        ("ready_s", "f8"),  # when it last became ready
        ("start_s", "f8"),  # when it last was given a device
        ("begin_s", "f8"),  # when that had its data and began
        ("finish_s", "f8"),
        ("prompt_tokens", "i8"),
        ("output_tokens", "i8"),
        ("cached_tokens", "i8"),  # prompt tokens that needed no prefill
        ("num_restarts", "i8"),
    ]
)
JOB_OUTCOME_DTYPE = np.dtype(
    [
        ("job", "i8"),  # in order of arrival
        ("job_idx", "i8"),  # which of `Episode.jobs`
        ("template", "i8"),  # number of its template's name, names in order
        ("arrival_s", "f8"),
        ("finish_s", "f8"),
        ("deadline_s", "f8"),  # after the arrival; inf for none
        ("weight", "f8"),
        ("num_stages", "i8"),
    ]
)
DEVICE_OUTCOME_DTYPE = np.dtype(
    [
        ("device", "i8"),
        ("type_idx", "i8"),
        ("busy_s", "f8"),  # with at least one stage
        ("slot_s", "f8"),  # sum over its stages of the time they held a slot
    ]
)
