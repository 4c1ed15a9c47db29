"""Non-delay dispatching in a job shop: whenever an operation can start, one does."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import kernel
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Graph, Workflow
from servegym.workflow.jobshop import require_job_shop
from servegym.workflow.schedule import Schedule


def dispatch(workflow: Workflow, key: FloatArray | None, rule: str) -> Schedule:
    """Start, of the operations that can start first, the one with the least key.

    Args:
        workflow: A job shop.
        key: `float64[num_tasks]`; None takes the time at which an operation became ready. The lower
            task of equals goes first.
        rule: Name, for the message if the workflow is no job shop.
    """
    require_job_shop(workflow, rule)
    num_tasks = workflow.num_tasks
    device = workflow.graph.duration_s.argmin(1)
    start_s, finish_s = np.zeros(num_tasks), np.zeros(num_tasks)
    dispatch_tasks(
        workflow.graph,
        int(key is None),
        np.zeros(num_tasks) if key is None else key,
        np.zeros(num_tasks, np.int64),
        np.zeros(num_tasks),
        np.zeros(workflow.num_devices),
        device,
        start_s,
        finish_s,
    )
    return Schedule(workflow, device, start_s, finish_s)


def own_duration_s(workflow: Workflow) -> FloatArray:
    """Duration of each operation on its machine, `float64[num_tasks]`."""
    own: FloatArray = workflow.graph.duration_s.min(1)
    return own


def remaining(workflow: Workflow, amount: FloatArray) -> FloatArray:
    """Sum `amount` over each operation and those after it in its job, `float64[num_tasks]`."""
    g = workflow.graph
    left = amount.copy()
    for v in g.order[::-1]:
        if g.succ_start[v] < g.succ_start[v + 1]:
            left[v] += left[g.child[g.succ_start[v]]]
    return left


@kernel
def dispatch_tasks(
    g: Graph,
    first_ready_first: int,
    key: FloatArray,
    ready: IntArray,
    ready_s: FloatArray,
    avail_s: FloatArray,
    device: IntArray,
    start_s: FloatArray,
    finish_s: FloatArray,
) -> None:
    """Fill `start_s` and `finish_s`."""
    num_ready = 0
    for v in range(g.duration_s.shape[0]):
        if g.pred_start[v] == g.pred_start[v + 1]:
            ready[num_ready] = v
            num_ready += 1
    while num_ready > 0:
        best, best_s, best_key = 0, math.inf, 0.0
        for i in range(num_ready):
            v = ready[i]
            begin_s = max(ready_s[v], avail_s[device[v]])
            this = ready_s[v] if first_ready_first != 0 else key[v]
            if (
                begin_s < best_s
                or (begin_s == best_s and this < best_key)
                or (begin_s == best_s and this == best_key and v < ready[best])
            ):
                best, best_s, best_key = i, begin_s, this
        v = ready[best]
        start_s[v] = best_s
        finish_s[v] = best_s + g.duration_s[v, device[v]]
        avail_s[device[v]] = finish_s[v]
        if g.succ_start[v] < g.succ_start[v + 1]:
            e = g.succ_start[v]
            ready[best] = g.child[e]
            ready_s[g.child[e]] = finish_s[v]
        else:
            num_ready -= 1
            ready[best] = ready[num_ready]
