"""Min-Min."""

from __future__ import annotations

from servegym.baselines.workflow.batch_mode import Preference, place_in_batches
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def min_min(workflow: Workflow) -> Schedule:
    """Place the ready task that can complete first, where it completes first."""
    return place_in_batches(workflow, Preference.LEAST_COMPLETION)
