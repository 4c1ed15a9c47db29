"""Predict earliest finish time."""

from __future__ import annotations

import numpy as np

from servegym.workflow.graph import Workflow
from servegym.workflow.placement import place_by_priority
from servegym.workflow.ranks import optimistic_costs, without_noise
from servegym.workflow.schedule import Schedule


def peft(workflow: Workflow) -> Schedule:
    """Take tasks by mean optimistic cost; place each where finish plus optimistic cost is least."""
    ahead_s = optimistic_costs(workflow)
    runs = np.isfinite(workflow.graph.duration_s)
    rank_s = np.where(runs, ahead_s, 0.0).sum(1) / runs.sum(1)
    return place_by_priority(workflow, without_noise(rank_s), ahead_s=ahead_s)
