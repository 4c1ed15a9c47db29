"""Fewest late jobs (Moore 1968, in Hodgson's form)."""

from __future__ import annotations

import heapq

import numpy as np

from servegym.baselines.workflow.sequence import run_in_order
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.tardiness import due_dates_of, require_due_dates, require_single_machine


def moore_hodgson(workflow: Workflow) -> Schedule:
    """Run as many jobs in time as any order can, by due date; the late ones come after them.

    Jobs are taken by due date; whenever one would be late, the longest taken so far is put off.
    Weights are not looked at.
    """
    work_s = require_single_machine(workflow, "moore-hodgson")
    require_due_dates(workflow, "moore-hodgson")
    due_s, _ = due_dates_of(workflow)
    taken: list[tuple[float, int]] = []
    late = np.zeros(workflow.num_tasks, bool)
    now_s = 0.0
    by_due = np.argsort(due_s, kind="stable")
    for v in by_due:
        heapq.heappush(taken, (-work_s[v], int(v)))
        now_s += work_s[v]
        if now_s > due_s[v]:
            longest_s, w = heapq.heappop(taken)
            late[w] = True
            now_s += longest_s
    return run_in_order(workflow, np.concatenate([by_due[~late[by_due]], by_due[late[by_due]]]))
