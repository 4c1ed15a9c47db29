"""Minimum execution time."""

from __future__ import annotations

import numpy as np

from servegym.workflow.graph import Workflow
from servegym.workflow.placement import Choice, place_by_priority
from servegym.workflow.schedule import Schedule


def met(workflow: Workflow) -> Schedule:
    """Take ready tasks in the order of the file; place each where it runs shortest, busy or not."""
    same = np.zeros(workflow.num_tasks)
    return place_by_priority(workflow, same, choice=Choice.SHORTEST_DURATION, insertion=False)
