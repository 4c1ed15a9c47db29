"""Earliest task first."""

from __future__ import annotations

from servegym.baselines.workflow.batch_mode import Preference, place_in_batches
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def etf(workflow: Workflow) -> Schedule:
    """Place the ready task that can start first, where it starts first."""
    return place_in_batches(workflow, Preference.EARLIEST_START)
