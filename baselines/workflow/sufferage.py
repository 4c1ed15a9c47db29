"""Sufferage."""

from __future__ import annotations

from servegym.baselines.workflow.batch_mode import Preference, place_in_batches
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule


def sufferage(workflow: Workflow) -> Schedule:
    """Place the ready task that loses most if its best device goes to another."""
    return place_in_batches(workflow, Preference.MOST_SUFFERAGE)
