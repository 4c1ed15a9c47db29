"""Modified due date (Baker and Bertrand 1982)."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.sequence import pick_by_priority
from servegym.typing import FloatArray
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def mdd(workflow: Workflow) -> Schedule:
    """Start the job with the earliest due date, or finish if that is later.

    By due date while there is slack, shortest first once jobs are late anyway.
    """
    return pick_by_priority(workflow, _modified, "mdd")


def _modified(
    work_s: FloatArray, due_s: FloatArray, weight: FloatArray, now_s: float
) -> FloatArray:
    return -np.maximum(due_s, now_s + work_s)
