"""Max-Min."""

from __future__ import annotations

from servegym.baselines.workflow.batch_mode import Preference, place_in_batches
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def max_min(workflow: Workflow) -> Schedule:
    """Place the ready task whose earliest completion is the latest, where it completes first."""
    return place_in_batches(workflow, Preference.MOST_COMPLETION)
