"""Minimum completion time."""

from __future__ import annotations

import numpy as np

from servegym.workflow.graph import Workflow
from servegym.workflow.placement import Choice, place_by_priority
from servegym.workflow.schedule import Schedule


def mct(workflow: Workflow) -> Schedule:
    """Take ready tasks in the order of the file; place each where it completes first."""
    same = np.zeros(workflow.num_tasks)
    return place_by_priority(workflow, same, choice=Choice.EARLIEST_FINISH, insertion=False)
