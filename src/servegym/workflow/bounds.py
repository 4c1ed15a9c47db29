"""What no schedule of a workflow can beat."""

from __future__ import annotations

import numpy as np

from servegym.typing import FloatArray
from servegym.workflow.graph import Workflow
from servegym.workflow.ranks import climb_down, climb_up


def critical_path_s(workflow: Workflow) -> float:
    """Longest path with each task on its fastest device and free transfers: the SLR's unit."""
    tail_s, _ = _tails_and_heads(workflow)
    return float(tail_s.max())


def lower_bound_s(workflow: Workflow) -> float:
    """Largest of three bounds on the makespan: critical path, shared work, each device's own work.

    Own work of a device is that of the tasks that run nowhere else: none starts before the least
    head among them, and after the last the least tail among them is still to do.
    """
    fastest_s = workflow.graph.duration_s.min(1)
    tail_s, head_s = _tails_and_heads(workflow)
    bounds = [tail_s.max(), fastest_s.sum() / workflow.num_devices]
    runs = np.isfinite(workflow.graph.duration_s)
    only_here = runs & (runs.sum(1) == 1)[:, None]
    for p in range(workflow.num_devices):
        own = only_here[:, p]
        if own.any():
            ahead_s = tail_s[own] - fastest_s[own]
            bounds.append(head_s[own].min() + fastest_s[own].sum() + ahead_s.min())
    return float(max(bounds))


def _tails_and_heads(workflow: Workflow) -> tuple[FloatArray, FloatArray]:
    fastest_s = workflow.graph.duration_s.min(1)
    free_s = np.zeros(workflow.num_edges)
    tail_s, head_s = np.zeros(workflow.num_tasks), np.zeros(workflow.num_tasks)
    climb_up(workflow.graph, fastest_s, free_s, tail_s)
    climb_down(workflow.graph, fastest_s, free_s, head_s)
    return tail_s, head_s
