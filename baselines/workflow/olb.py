"""Opportunistic load balancing."""

from __future__ import annotations

import numpy as np

from servegym.workflow.graph import Workflow
from servegym.workflow.placement import Choice, place_by_priority
from servegym.workflow.schedule import Schedule


def olb(workflow: Workflow) -> Schedule:
    """Take ready tasks in the order of the file; place each on the device that is idle first."""
    same = np.zeros(workflow.num_tasks)
    return place_by_priority(workflow, same, choice=Choice.FIRST_IDLE, insertion=False)
