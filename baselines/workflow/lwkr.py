"""Least work remaining."""

from __future__ import annotations

from servegym.baselines.workflow.dispatching import dispatch, own_duration_s, remaining
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def lwkr(workflow: Workflow) -> Schedule:
    """Start an operation of the job with the least work left, this one included."""
    return dispatch(workflow, remaining(workflow, own_duration_s(workflow)), "lwkr")
