"""The outcome: on which device and when each task runs, and how good that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.typing import FloatArray, IntArray
from servegym.workflow.bounds import critical_path_s
from servegym.workflow.graph import Workflow


@dataclass(frozen=True)
class Schedule:
    """A device and a time for every task of a workflow.

    Exact solvers set `status` to whether the makespan is proved optimal, and `bound_s` to a lower
    bound that they proved.
    """

    workflow: Workflow
    device_idx: IntArray  # [num_tasks]
    start_s: FloatArray  # [num_tasks]
    finish_s: FloatArray  # [num_tasks]
    status: str = "heuristic"
    bound_s: float | None = None

    @property
    def makespan_s(self) -> float:
        """When the last task finishes."""
        return float(self.finish_s.max())

    @property
    def slr(self) -> float:
        """Schedule length ratio: makespan over the critical path under least durations."""
        path_s = critical_path_s(self.workflow)
        return self.makespan_s / path_s if path_s else float("nan")

    @property
    def speedup(self) -> float:
        """All tasks one after the other on the best device, over the makespan; NaN if none can."""
        serial_s = float(self.workflow.graph.duration_s.sum(0).min())
        if not np.isfinite(serial_s) or not self.makespan_s:
            return float("nan")
        return serial_s / self.makespan_s

    @property
    def efficiency(self) -> float:
        """Speed-up over the number of devices."""
        return self.speedup / self.workflow.num_devices

    @property
    def mean_flow_s(self) -> float:
        """Mean finish of the tasks without children: in a job shop, the mean flow time of jobs."""
        last = np.diff(self.workflow.graph.succ_start) == 0
        return float(self.finish_s[last].mean())


def violations(schedule: Schedule) -> list[str]:
    """List what is wrong with a schedule, one sentence each; none if it can be carried out."""
    flow, g = schedule.workflow, schedule.workflow.graph
    device, start_s, finish_s = schedule.device_idx, schedule.start_s, schedule.finish_s
    found = []
    work_s = g.duration_s[np.arange(flow.num_tasks), device]
    for v in np.flatnonzero(finish_s != start_s + work_s):
        found.append(f"{flow.tasks[v]} does not take {work_s[v]:g} s")
    for v in np.flatnonzero(~(start_s >= 0.0)):
        found.append(f"{flow.tasks[v]} starts before 0 s")
    p, q = device[g.parent], device[g.child]
    between_s = g.transfer_s + g.over_link * g.latency_s[p, q] + g.data_bytes * g.s_per_byte[p, q]
    there_s = finish_s[g.parent] + np.where(p == q, 0.0, between_s)
    for e in np.flatnonzero(start_s[g.child] < there_s):
        names = flow.tasks[g.child[e]], flow.tasks[g.parent[e]]
        found.append(f"{names[0]} starts before the data of {names[1]} is there")
    order = np.lexsort((finish_s, start_s, device))
    same = device[order[1:]] == device[order[:-1]]
    for i in np.flatnonzero(same & (start_s[order[1:]] < finish_s[order[:-1]])):
        names = flow.tasks[order[i]], flow.tasks[order[i + 1]]
        found.append(f"{names[0]} and {names[1]} overlap on {flow.devices[device[order[i]]]}")
    return found
