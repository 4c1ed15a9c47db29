"""Earliest due date (Jackson 1955)."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.sequence import run_in_order
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.tardiness import due_dates_of, require_due_dates, require_single_machine


def edd(workflow: Workflow) -> Schedule:
    """Run jobs by due date; no order has a lower maximum lateness."""
    require_single_machine(workflow, "edd")
    require_due_dates(workflow, "edd")
    due_s, _ = due_dates_of(workflow)
    return run_in_order(workflow, np.argsort(due_s, kind="stable"))
