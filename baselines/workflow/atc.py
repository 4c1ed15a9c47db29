"""Apparent tardiness cost (Vepsalainen and Morton 1987)."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.sequence import pick_by_priority
from servegym.typing import FloatArray
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule

#: Over how many mean durations urgency falls with slack.
LOOK_AHEAD = 2.0


def atc(workflow: Workflow) -> Schedule:
    """Start the job with the largest weight per second, less the more slack it has."""
    return pick_by_priority(workflow, _index, "atc")


def _index(work_s: FloatArray, due_s: FloatArray, weight: FloatArray, now_s: float) -> FloatArray:
    if not work_s.all():  # what takes no time delays nobody
        return np.where(work_s == 0.0, 1.0, 0.0)
    slack_s = np.maximum(due_s - work_s - now_s, 0.0)
    # in logarithms: far from their due dates the indices of jobs would be 0, and so all alike
    return np.log(weight) - np.log(work_s) - slack_s / (LOOK_AHEAD * work_s.mean())
