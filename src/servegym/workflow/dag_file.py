"""Our own JSON file of a DAG, `servegym-dag-1`; docs/workflow.md describes it."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from servegym.documents import one_sentence
from servegym.errors import unknown_name
from servegym.typing import FloatArray
from servegym.whole_files import write_whole
from servegym.workflow.graph import Workflow, WorkflowError, make_workflow, require_names

SCHEMA = "servegym-dag-1"
_Seconds = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DeviceEntry(_Part):
    """A device; its type, by default its name, is what durations are given for."""

    name: str
    type: str | None = None


class LinkSpeed(_Part):
    """What moving data costs; null bandwidth: latency only, whatever the size."""

    latency_s: _Seconds = 0.0
    bytes_per_s: Annotated[float, Field(gt=0)] | None

    @property
    def s_per_byte(self) -> float:
        """Seconds a byte takes, 0 on a link without a limit."""
        return 1.0 / self.bytes_per_s if self.bytes_per_s else 0.0


class LinkEntry(LinkSpeed):
    """A link between two devices, both ways, or one way from the first to the second."""

    between: tuple[str, str]
    one_way: bool = False


class TaskEntry(_Part):
    """A task with a duration per device type; null where it cannot run."""

    name: str
    duration_s: dict[str, _Seconds | None]
    due_s: float | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


class EdgeEntry(_Part):
    """A child waits for a parent and its data."""

    parent: str
    child: str
    transfer_s: _Seconds | None = None
    bytes: _Seconds | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> EdgeEntry:
        if self.transfer_s is not None and self.bytes is not None:
            raise ValueError("an edge has either transfer_s or bytes, not both")
        return self


class DagFile(_Part):
    """The file as it is written."""

    # "schema" is a name that pydantic keeps for itself
    schema_: Annotated[Literal["servegym-dag-1"], Field(alias="schema")]
    name: str = "workflow"
    devices: list[DeviceEntry]
    default_link: LinkSpeed | None = None
    links: list[LinkEntry] = []
    tasks: list[TaskEntry]
    edges: list[EdgeEntry] = []


def dag_from_document(document: Any, origin: str) -> Workflow:
    """Turn a parsed file into a workflow.

    Args:
        document: What the JSON text holds.
        origin: Name of the file, for messages.

    Raises:
        WorkflowError: If a key, a name or a number is wrong.
    """
    try:
        dag = DagFile.model_validate(document)
    except ValidationError as error:
        said = one_sentence(error, document, DagFile, by_name=True)
        raise WorkflowError(f"{origin}: {said}") from error
    tasks = [task.name for task in dag.tasks]
    devices = [device.name for device in dag.devices]
    require_names("task", tasks)
    require_names("device", devices)
    task_idx = {name: v for v, name in enumerate(tasks)}
    device_idx = {name: p for p, name in enumerate(devices)}
    latency_s, s_per_byte = _links(dag, device_idx, origin)
    return make_workflow(
        tasks,
        devices,
        _durations(dag),
        [
            (
                _position("task", edge.parent, task_idx, origin),
                _position("task", edge.child, task_idx, origin),
            )
            for edge in dag.edges
        ],
        transfer_s=[edge.transfer_s or 0.0 for edge in dag.edges],
        data_bytes=[math.nan if edge.bytes is None else edge.bytes for edge in dag.edges],
        latency_s=latency_s,
        s_per_byte=s_per_byte,
        due_s=_due_s(dag),
        weight=_weights(dag),
        name=dag.name,
    )


def write_dag(workflow: Workflow, path: Path) -> None:
    """Write a workflow so that reading the file gives it back."""
    g = workflow.graph
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "name": workflow.name,
        "devices": [{"name": name} for name in workflow.devices],
        "tasks": [
            {
                "name": task,
                "duration_s": {
                    device: work_s if math.isfinite(work_s) else None
                    for device, work_s in zip(workflow.devices, row, strict=True)
                },
                **_due_entry(workflow, v),
            }
            for v, (task, row) in enumerate(zip(workflow.tasks, g.duration_s.tolist(), strict=True))
        ],
        "edges": [
            {
                "parent": workflow.tasks[g.parent[e]],
                "child": workflow.tasks[g.child[e]],
                **(
                    {"bytes": float(g.data_bytes[e])}
                    if g.over_link[e]
                    else {"transfer_s": float(g.transfer_s[e])}
                ),
            }
            for e in range(workflow.num_edges)
        ],
    }
    if g.over_link.any():
        document["links"] = [
            {
                "between": [workflow.devices[p], workflow.devices[q]],
                "latency_s": float(g.latency_s[p, q]),
                "bytes_per_s": 1.0 / float(g.s_per_byte[p, q]) if g.s_per_byte[p, q] else None,
                "one_way": True,
            }
            for p in range(workflow.num_devices)
            for q in range(workflow.num_devices)
            if p != q
        ]
    write_whole({path: (json.dumps(document, indent=1) + "\n").encode()})


def _durations(dag: DagFile) -> FloatArray:
    """NaN where a device type has no entry, inf where the entry is null."""
    types = [device.type or device.name for device in dag.devices]
    rows = [
        [
            math.inf if (work_s := task.duration_s.get(kind, math.nan)) is None else work_s
            for kind in types
        ]
        for task in dag.tasks
    ]
    return np.array(rows, float).reshape(len(dag.tasks), len(types))


def _due_s(dag: DagFile) -> list[float] | None:
    if all(task.due_s is None for task in dag.tasks):
        return None
    return [math.inf if task.due_s is None else task.due_s for task in dag.tasks]


def _weights(dag: DagFile) -> list[float] | None:
    weights = [task.weight for task in dag.tasks]
    return weights if set(weights) != {1.0} else None


def _due_entry(workflow: Workflow, v: int) -> dict[str, float]:
    """What a task's entry says of its due date and weight."""
    entry = {}
    if workflow.due_s is not None and math.isfinite(workflow.due_s[v]):
        entry["due_s"] = float(workflow.due_s[v])
    if workflow.weight is not None:
        entry["weight"] = float(workflow.weight[v])
    return entry


def _links(dag: DagFile, device_idx: dict[str, int], origin: str) -> tuple[FloatArray, FloatArray]:
    shape = len(dag.devices), len(dag.devices)
    default = dag.default_link
    latency_s = np.full(shape, default.latency_s if default else math.inf)
    s_per_byte = np.full(shape, default.s_per_byte if default else math.inf)
    given: set[tuple[int, int]] = set()
    for link in dag.links:
        p, q = (_position("device", name, device_idx, origin) for name in link.between)
        for ends in [(p, q)] if link.one_way else [(p, q), (q, p)]:
            if ends in given:
                raise WorkflowError(
                    f"{origin}: the link from {dag.devices[ends[0]].name} to"
                    f" {dag.devices[ends[1]].name} is given twice"
                )
            given.add(ends)
            latency_s[ends] = link.latency_s
            s_per_byte[ends] = link.s_per_byte
    return latency_s, s_per_byte


def _position(kind: str, name: str, known: dict[str, int], origin: str) -> int:
    if name not in known:
        if len(known) > 20:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise WorkflowError(f"{origin}: unknown {kind} {name!r}{hint}")
        raise WorkflowError(f"{origin}: {unknown_name(kind, name, known)}")
    return known[name]
