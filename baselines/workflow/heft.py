"""Heterogeneous earliest finish time."""

from __future__ import annotations

from servegym.workflow.graph import Workflow
from servegym.workflow.placement import place_by_priority
from servegym.workflow.ranks import rank_upward, without_noise
from servegym.workflow.schedule import Schedule


def heft(workflow: Workflow) -> Schedule:
    """Take tasks by upward rank; place each where it finishes first, in gaps if it fits."""
    return place_by_priority(workflow, without_noise(rank_upward(workflow)))
