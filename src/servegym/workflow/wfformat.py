"""Recorded scientific workflows of WfCommons (WfFormat 1.3 to 1.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from servegym.workflow.graph import Workflow, WorkflowError, make_workflow


@dataclass(frozen=True)
class Fleet:
    """Devices for a file that names none: speeds against the machine of the record, and one link.

    Device i takes `recorded duration / speeds[i]`.
    """

    speeds: tuple[float, ...] = (1.0, 1.0, 2.0, 4.0)
    link_bytes_per_s: float = 1.25e9
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.speeds or not all(0.0 < speed < np.inf for speed in self.speeds):
            raise WorkflowError(
                f"speeds must be numbers above 0, at least one, got {list(self.speeds)}"
            )
        if not 0.0 < self.link_bytes_per_s < np.inf:
            raise WorkflowError(f"link_bytes_per_s must be above 0, got {self.link_bytes_per_s:g}")
        if not 0.0 <= self.latency_s < np.inf:
            raise WorkflowError(f"latency_s must be at least 0, got {self.latency_s:g}")


def workflow_on_fleet(
    name: str,
    tasks: Sequence[str],
    runtime_s: Sequence[float],
    edges: Sequence[tuple[int, int]],
    data_bytes: Sequence[float],
    fleet: Fleet,
) -> Workflow:
    """Place recorded runtimes and data sizes on a fleet."""
    speeds = np.array(fleet.speeds)
    return make_workflow(
        tasks,
        [f"device{p}-x{speed:g}" for p, speed in enumerate(fleet.speeds)],
        np.array(runtime_s, float)[:, None] / speeds,
        edges,
        data_bytes=data_bytes,
        latency_s=fleet.latency_s,
        s_per_byte=1.0 / fleet.link_bytes_per_s,
        name=name,
    )


def workflow_from_wfformat(document: Mapping[str, Any], origin: str, fleet: Fleet) -> Workflow:
    """Turn a parsed WfFormat file into a workflow.

    An edge carries the files that its parent writes and its child reads.

    Args:
        document: What the JSON text holds.
        origin: Name of the file, for messages.
        fleet: Devices to run it on.

    Raises:
        WorkflowError: If tasks, runtimes or file sizes are missing or no numbers.
    """
    try:
        return _workflow(document, fleet)
    except KeyError as error:
        raise WorkflowError(f"{origin}: {error} is missing in this WfFormat file") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise WorkflowError(f"{origin} is not WfFormat: {error}") from error


def _workflow(document: Mapping[str, Any], fleet: Fleet) -> Workflow:
    body = document["workflow"]
    recent = "specification" in body
    tasks = body["specification"]["tasks"] if recent else body["tasks"]
    # from 1.4 on parents are given by id, before by name
    key = "id" if recent else "name"
    names = [str(task[key]) for task in tasks]
    task_idx = {name: v for v, name in enumerate(names)}
    if recent:
        size_bytes = {
            f["id"]: float(f["sizeInBytes"]) for f in body["specification"].get("files", ())
        }
        measured = {str(t["id"]): t["runtimeInSeconds"] for t in body["execution"]["tasks"]}
        runtime_s = [float(measured[str(task["id"])]) for task in tasks]
        writes = [set(task.get("outputFiles", ())) for task in tasks]
        reads = [set(task.get("inputFiles", ())) for task in tasks]
    else:
        size_bytes = {
            f["name"]: float(f.get("sizeInBytes", f.get("size")))
            for task in tasks
            for f in task.get("files", ())
        }
        runtime_s = [float(task.get("runtimeInSeconds", task.get("runtime"))) for task in tasks]
        writes, reads = (
            [{f["name"] for f in task.get("files", ()) if f["link"] == link} for task in tasks]
            for link in ("output", "input")
        )
    edges = sorted({(task_idx[str(u)], v) for v, task in enumerate(tasks) for u in task["parents"]})
    data_bytes = [sum(size_bytes[f] for f in sorted(writes[u] & reads[v])) for u, v in edges]
    return workflow_on_fleet(
        str(document.get("name", "workflow")), names, runtime_s, edges, data_bytes, fleet
    )
