"""Jobs of tasks from the workflows that the static schedulers take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.workflow.graph import Workflow
from servegym.workflow.job import Job, JobBuilder


def job_from_workflow(
    workflow: Workflow,
    template: str,
    *,
    labels: Sequence[int] | None = None,
    device_types: tuple[str, ...] | None = None,
    link_bytes_per_s: float = 1.25e9,
) -> Job:
    """Turn each task into a stage, in an order in which parents come first.

    The simulator of jobs moves bytes over links: an edge with a transfer time gets as many as a
    link of `link_bytes_per_s` moves in it.

    Args:
        workflow: Each of its devices is a device type of the job.
        template: Of the job.
        labels: Of the tasks; None: all are 0.
        device_types: Names of the types; None: those of the devices.
        link_bytes_per_s: Bandwidth that transfer times stand for.
    """
    g = workflow.graph
    types = device_types or workflow.devices
    builder = JobBuilder(template, types)
    stage = np.empty(workflow.num_tasks, np.int64)
    for v in g.order:
        duration_s = dict(zip(types, g.duration_s[v].tolist(), strict=True))
        stage[v] = builder.task(0 if labels is None else int(labels[v]), duration_s)
    for e in range(workflow.num_edges):
        data_bytes = g.data_bytes[e] if g.over_link[e] else g.transfer_s[e] * link_bytes_per_s
        builder.edge(int(stage[g.parent[e]]), int(stage[g.child[e]]), data_bytes=float(data_bytes))
    return builder.build()
