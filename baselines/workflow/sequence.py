"""One machine, one job after the other: sequences, and rules that pick the next job."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.tardiness import due_dates_of, require_due_dates, require_single_machine

#: Priority of jobs at a time: durations, due dates and weights of those left, the time; the
#: largest goes first.
Priority = Callable[[FloatArray, FloatArray, FloatArray, float], FloatArray]


def run_in_order(
    workflow: Workflow, order: Sequence[int] | IntArray, status: str = "heuristic"
) -> Schedule:
    """Run the tasks on the one device in the given order without a pause."""
    order = np.asarray(order)
    finish_s = np.empty(workflow.num_tasks)
    work_s = workflow.graph.duration_s[:, 0]
    finish_s[order] = np.cumsum(work_s[order])
    # start plus duration is the finish, to the last bit
    start_s = np.zeros(workflow.num_tasks)
    start_s[order[1:]] = finish_s[order[:-1]]
    finish_s = start_s + work_s
    device = np.zeros(workflow.num_tasks, np.int64)
    return Schedule(workflow, device, start_s, finish_s, status=status)


def pick_by_priority(workflow: Workflow, priority: Priority, rule: str) -> Schedule:
    """Whenever the machine is free, start the job that then has the largest priority.

    The first of equals goes first.

    Args:
        workflow: Independent tasks with due dates on one device.
        priority: Depends on the time.
        rule: Name, for messages.
    """
    work_s = require_single_machine(workflow, rule)
    require_due_dates(workflow, rule)
    due_s, weight = due_dates_of(workflow)
    left = np.arange(workflow.num_tasks)
    order, now_s = [], 0.0
    while len(left):
        first = int(np.argmax(priority(work_s[left], due_s[left], weight[left], now_s)))
        order.append(left[first])
        now_s += work_s[left[first]]
        left = np.delete(left, first)
    return run_in_order(workflow, np.array(order))
