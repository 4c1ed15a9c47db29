"""First in, first out."""

from __future__ import annotations

from servegym.baselines.workflow.dispatching import dispatch
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def fifo(workflow: Workflow) -> Schedule:
    """Start the operation that became ready first."""
    return dispatch(workflow, None, "fifo")
