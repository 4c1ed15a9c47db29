"""Shortest processing time."""

from __future__ import annotations

from servegym.baselines.workflow.dispatching import dispatch, own_duration_s
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def spt(workflow: Workflow) -> Schedule:
    """Start the shortest operation."""
    return dispatch(workflow, own_duration_s(workflow), "spt")
