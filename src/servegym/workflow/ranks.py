"""Priorities of tasks: how much work lies behind and ahead of them."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import kernel
from servegym.typing import FloatArray
from servegym.workflow.graph import Graph, Workflow


def rank_upward(workflow: Workflow) -> FloatArray:
    """Longest way from the start of each task to the end, mean costs, `float64[num_tasks]`, s.

    Equation 9 of Topcuoglu, Hariri and Wu (2002).
    """
    rank_s = np.zeros(workflow.num_tasks)
    climb_up(workflow.graph, workflow.mean_duration_s, workflow.mean_moving_s, rank_s)
    return rank_s


def rank_downward(workflow: Workflow) -> FloatArray:
    """Longest way from the beginning to each task, mean costs, `float64[num_tasks]`, s.

    Equation 11 of Topcuoglu, Hariri and Wu (2002).
    """
    rank_s = np.zeros(workflow.num_tasks)
    climb_down(workflow.graph, workflow.mean_duration_s, workflow.mean_moving_s, rank_s)
    return rank_s


def optimistic_costs(workflow: Workflow) -> FloatArray:
    """Time from the end of each task to the end of all if every device were idle.

    The optimistic cost table of Arabnejad and Barbosa (2014), `float64[num_tasks, num_devices]`, s.
    """
    cost_s = np.zeros((workflow.num_tasks, workflow.num_devices))
    fill_optimistic_costs(workflow.graph, workflow.mean_moving_s, cost_s)
    return cost_s


def without_noise(rank_s: FloatArray) -> FloatArray:
    """Round to 40 bits of the largest rank, so that equal sums in another order are a tie."""
    largest = float(rank_s.max(initial=0.0))
    if largest == 0.0:
        return rank_s
    unit = math.ldexp(1.0, math.frexp(largest)[1] - 40)
    rounded: FloatArray = np.round(rank_s / unit) * unit
    return rounded


@kernel
def climb_up(g: Graph, duration_s: FloatArray, moving_s: FloatArray, rank_s: FloatArray) -> None:
    """Fill `rank_s` with the longest way to an exit, the task's own duration included."""
    for i in range(g.order.shape[0] - 1, -1, -1):
        v = g.order[i]
        ahead_s = 0.0
        for e in range(g.succ_start[v], g.succ_start[v + 1]):
            ahead_s = max(ahead_s, moving_s[e] + rank_s[g.child[e]])
        rank_s[v] = duration_s[v] + ahead_s


@kernel
def climb_down(g: Graph, duration_s: FloatArray, moving_s: FloatArray, rank_s: FloatArray) -> None:
    """Fill `rank_s` with the longest way from an entry, the task's own duration left out."""
    for i in range(g.order.shape[0]):
        v = g.order[i]
        behind_s = 0.0
        for k in range(g.pred_start[v], g.pred_start[v + 1]):
            e = g.pred_edge[k]
            u = g.parent[e]
            behind_s = max(behind_s, rank_s[u] + duration_s[u] + moving_s[e])
        rank_s[v] = behind_s


@kernel
def fill_optimistic_costs(g: Graph, moving_s: FloatArray, cost_s: FloatArray) -> None:
    """Fill the table; a child's best device is found once, so an edge costs num_devices steps."""
    num_devices = g.duration_s.shape[1]
    for i in range(g.order.shape[0] - 1, -1, -1):
        v = g.order[i]
        for e in range(g.succ_start[v], g.succ_start[v + 1]):
            w = g.child[e]
            elsewhere_s = math.inf
            for q in range(num_devices):
                elsewhere_s = min(elsewhere_s, cost_s[w, q] + g.duration_s[w, q])
            elsewhere_s += moving_s[e]
            for p in range(num_devices):
                here_s = cost_s[w, p] + g.duration_s[w, p]
                cost_s[v, p] = max(cost_s[v, p], min(here_s, elsewhere_s))
