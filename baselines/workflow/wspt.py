"""Weighted shortest processing time (Smith 1956)."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.sequence import run_in_order
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.tardiness import due_dates_of, require_single_machine


def wspt(workflow: Workflow) -> Schedule:
    """Run jobs by duration over weight; no order has a lower weighted sum of finishes."""
    work_s = require_single_machine(workflow, "wspt")
    _, weight = due_dates_of(workflow)
    return run_in_order(workflow, np.argsort(work_s / weight, kind="stable"))
