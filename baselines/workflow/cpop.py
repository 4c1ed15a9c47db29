"""Critical path on a processor."""

from __future__ import annotations

import numpy as np

from servegym.typing import FloatArray
from servegym.workflow.graph import Workflow, WorkflowError
from servegym.workflow.placement import FIXED_NOWHERE, place_by_priority
from servegym.workflow.ranks import rank_downward, rank_upward, without_noise
from servegym.workflow.schedule import Schedule


def cpop(workflow: Workflow) -> Schedule:
    """Keep the critical path on the device that runs it fastest; place others like HEFT."""
    priority_s = without_noise(rank_upward(workflow) + rank_downward(workflow))
    path = critical_path(workflow, priority_s)
    path_s = workflow.graph.duration_s[path].sum(0)
    best = int(path_s.argmin())
    if not np.isfinite(path_s[best]):
        raise WorkflowError(
            "cpop keeps the critical path on one device, and none can run"
            f" {' -> '.join(workflow.tasks[v] for v in path[:5])}{' ...' * (len(path) > 5)}"
        )
    fixed = np.full(workflow.num_tasks, FIXED_NOWHERE)
    fixed[path] = best
    return place_by_priority(workflow, priority_s, fixed_device=fixed)


def critical_path(workflow: Workflow, priority_s: FloatArray) -> list[int]:
    """Walk from the entry task of highest priority along children of the same priority."""
    g = workflow.graph
    entries = np.flatnonzero(np.diff(g.pred_start) == 0)
    path = [int(entries[priority_s[entries].argmax()])]
    while g.succ_start[path[-1]] < g.succ_start[path[-1] + 1]:
        children = g.child[g.succ_start[path[-1]] : g.succ_start[path[-1] + 1]]
        path.append(int(children[priority_s[children].argmax()]))
    return path
