"""Local search from a rule's sequence: swaps of neighbours, then moves of one job."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.edd import edd
from servegym.baselines.workflow.mdd import mdd
from servegym.baselines.workflow.sequence import run_in_order
from servegym.cluster.jit import inlined, kernel
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.tardiness import due_dates_of

#: Sequences looked at are at most this many times the square of the number of jobs.
EFFORT = 50


def edd_ls(workflow: Workflow) -> Schedule:
    """Improve on the order of EDD by local search."""
    return improve(edd(workflow))


def mdd_ls(workflow: Workflow) -> Schedule:
    """Improve on the order of MDD by local search."""
    return improve(mdd(workflow))


def improve(schedule: Schedule) -> Schedule:
    """Lower the weighted tardiness of a single-machine schedule; it never gets higher.

    The first swap of neighbours that gains is made until there is none; then the one move of a job
    to another place that gains most, and so on until nothing gains or the effort is spent.
    """
    workflow = schedule.workflow
    due_s, weight = due_dates_of(workflow)
    order = np.lexsort((schedule.finish_s, schedule.start_s))
    work_s = workflow.graph.duration_s[:, 0].copy()
    search(work_s, due_s, weight, order, np.zeros(workflow.num_tasks))
    return run_in_order(workflow, order)


@inlined
def late_s(due_s: FloatArray, weight: FloatArray, v: int, finish_s: float) -> float:
    """Weighted tardiness of job `v` that finishes at `finish_s`."""
    return weight[v] * max(0.0, finish_s - due_s[v])


@kernel
def search(
    work_s: FloatArray,
    due_s: FloatArray,
    weight: FloatArray,
    order: IntArray,
    start_s: FloatArray,
) -> None:
    """Improve `order` in place; `start_s` is room for the starts of its places."""
    num_jobs = len(order)
    budget = EFFORT * num_jobs * num_jobs
    # gains below this are rounding: taking them could go round in circles
    least_gain = 1e-9 * (1.0 + work_s.sum())
    while budget > 0:
        swapped = True
        while swapped and budget > 0:
            swapped = False
            now_s = 0.0
            for i in range(num_jobs - 1):
                v, w = order[i], order[i + 1]
                budget -= 1
                both_s = now_s + work_s[v] + work_s[w]
                before = late_s(due_s, weight, v, now_s + work_s[v])
                before += late_s(due_s, weight, w, both_s)
                after = late_s(due_s, weight, w, now_s + work_s[w])
                after += late_s(due_s, weight, v, both_s)
                if after < before - least_gain:
                    order[i], order[i + 1] = w, v
                    swapped = True
                now_s += work_s[order[i]]
        now_s = 0.0
        for i in range(num_jobs):
            start_s[i] = now_s
            now_s += work_s[order[i]]
        best_gain, best_from, best_to = least_gain, -1, -1
        for i in range(num_jobs):
            v = order[i]
            own = late_s(due_s, weight, v, start_s[i] + work_s[v])
            shifted = 0.0  # what the jobs that v passes gain, less what they lose
            for j in range(i + 1, num_jobs):  # v goes behind job j; those before come earlier
                w = order[j]
                end_s = start_s[j] + work_s[w]
                shifted += late_s(due_s, weight, w, end_s)
                shifted -= late_s(due_s, weight, w, end_s - work_s[v])
                gain = shifted + own - late_s(due_s, weight, v, end_s)
                if gain > best_gain:
                    best_gain, best_from, best_to = gain, i, j
            shifted = 0.0
            for j in range(i - 1, -1, -1):  # v goes before job j; those after come later
                w = order[j]
                end_s = start_s[j] + work_s[w]
                shifted += late_s(due_s, weight, w, end_s)
                shifted -= late_s(due_s, weight, w, end_s + work_s[v])
                gain = shifted + own - late_s(due_s, weight, v, start_s[j] + work_s[v])
                if gain > best_gain:
                    best_gain, best_from, best_to = gain, i, j
        budget -= num_jobs * (num_jobs - 1)
        if best_from < 0:
            return
        v = order[best_from]
        step = 1 if best_to > best_from else -1
        for k in range(best_from, best_to, step):
            order[k] = order[k + step]
        order[best_to] = v
