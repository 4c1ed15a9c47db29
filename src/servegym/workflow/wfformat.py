"""Recorded scientific workflows of WfCommons (WfFormat 1.3 to 1.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from servegym.workflow.graph import Workflow, WorkflowError, make_workflow, require_names


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


class RecordedTask(NamedTuple):
    """A task as the file has it.

    Attributes:
        name: By which parents are given.
        program: Its name, which tasks that do the same share.
        parents: Names of the tasks it waits for.
        children: Names of those that wait for it, None if the file does not say.
        runtime_s: Recorded.
        reads: Files.
        writes: Files.
    """

    name: str
    program: str
    parents: tuple[str, ...]
    children: tuple[str, ...] | None
    runtime_s: float
    reads: frozenset[str]
    writes: frozenset[str]


def workflow_from_wfformat(document: Mapping[str, Any], origin: str, fleet: Fleet) -> Workflow:
    """Turn a parsed WfFormat file into a workflow.

    An edge carries the files that its parent writes and its child reads.

    Args:
        document: What the JSON text holds.
        origin: Name of the file, for messages.
        fleet: Devices to run it on.

    Raises:
        WorkflowError: If something is missing, no number, named twice or contradicts something
            else; it names the task.
    """
    tasks, size_bytes = recorded_tasks(document, origin)
    task_idx = {task.name: v for v, task in enumerate(tasks)}
    edges = sorted({(task_idx[u], v) for v, task in enumerate(tasks) for u in task.parents})
    written = frozenset[str]().union(*(task.writes for task in tasks))
    data_bytes = [_carried(origin, tasks[u], tasks[v], written, size_bytes) for u, v in edges]
    return workflow_on_fleet(
        str(document.get("name", "workflow")),
        [task.name for task in tasks],
        [task.runtime_s for task in tasks],
        edges,
        data_bytes,
        fleet,
    )


def recorded_tasks(
    document: Mapping[str, Any], origin: str
) -> tuple[list[RecordedTask], dict[str, set[object]]]:
    """Read and check the tasks of a parsed WfFormat file.

    Returns:
        The tasks, and what the file says of each file's size in bytes.

    Raises:
        WorkflowError: As `workflow_from_wfformat`, but for what edges carry.
    """
    try:
        body = document["workflow"]
        recent = "specification" in body
        tasks, sizes = (_recent if recent else _older)(body, origin)
    except KeyError as error:
        raise WorkflowError(f"{origin}: {error} is missing in this WfFormat file") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise WorkflowError(f"{origin} is not WfFormat: {error}") from error
    require_names("task", [task.name for task in tasks])
    by_name = {task.name: task for task in tasks}
    for task in tasks:
        for parent in task.parents:
            if parent not in by_name:
                raise WorkflowError(
                    f"{origin}: task {task.name} has the parent {parent}, which is no task there"
                )
    for task in tasks:
        for child in task.children or ():
            if child not in by_name:
                raise WorkflowError(
                    f"{origin}: task {task.name} has the child {child}, which is no task there"
                )
            if task.name not in by_name[child].parents:
                raise WorkflowError(
                    f"{origin}: task {task.name} has the child {child}, which does not name it"
                    " among its parents"
                )
    return tasks, sizes


def _recent(
    body: Mapping[str, Any], origin: str
) -> tuple[list[RecordedTask], dict[str, set[object]]]:
    """From 1.4 on: parents by id, files and runtimes in lists of their own."""
    sizes: dict[str, set[object]] = {}
    for file in body["specification"].get("files") or ():
        sizes.setdefault(str(file["id"]), set()).add(file.get("sizeInBytes"))
    runtimes: dict[str, object] = {}
    for measured in body["execution"]["tasks"]:
        name = str(measured["id"])
        if name in runtimes:
            raise WorkflowError(f"{origin}: task {name} has two runtimes in execution.tasks")
        runtimes[name] = measured.get("runtimeInSeconds")
    tasks = []
    for task in body["specification"]["tasks"]:
        name = str(task["id"])
        if name not in runtimes:
            raise WorkflowError(f"{origin}: task {name} has no runtime in execution.tasks")
        tasks.append(
            RecordedTask(
                name,
                str(task.get("name", name)),
                _names(origin, name, task, "parents", needed=True),
                _names(origin, name, task, "children") if "children" in task else None,
                _seconds(origin, name, runtimes[name]),
                frozenset(_names(origin, name, task, "inputFiles")),
                frozenset(_names(origin, name, task, "outputFiles")),
            )
        )
    return tasks, sizes


def _older(
    body: Mapping[str, Any], origin: str
) -> tuple[list[RecordedTask], dict[str, set[object]]]:
    """Up to 1.3: parents by name, files and runtimes with each task."""
    sizes: dict[str, set[object]] = {}
    tasks = []
    for task in body["tasks"]:
        name = str(task["name"])
        files: dict[object, set[str]] = {"input": set(), "output": set()}
        for file in task.get("files") or ():
            sizes.setdefault(str(file["name"]), set()).add(
                file.get("sizeInBytes", file.get("size"))
            )
            if file["link"] not in files:
                raise WorkflowError(
                    f"{origin}: file {file['name']} of task {name} has link {file['link']!r}, which"
                    " must be input or output"
                )
            files[file["link"]].add(str(file["name"]))
        tasks.append(
            RecordedTask(
                name,
                name,
                _names(origin, name, task, "parents", needed=True),
                _names(origin, name, task, "children") if "children" in task else None,
                _seconds(origin, name, task.get("runtimeInSeconds", task.get("runtime"))),
                frozenset(files["input"]),
                frozenset(files["output"]),
            )
        )
    return tasks, sizes


def _names(
    origin: str, task: str, entry: Mapping[str, Any], key: str, *, needed: bool = False
) -> tuple[str, ...]:
    found = entry.get(key)
    if not isinstance(found, list) and (needed or found is not None):
        got = "nothing" if found is None else repr(found)
        raise WorkflowError(
            f"{origin}: task {task} must have a list of names as {key}, empty for none, got {got}"
        )
    return tuple(str(name) for name in found or ())


def _seconds(origin: str, task: str, value: object) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < np.inf
    if not right:
        raise WorkflowError(
            f"{origin}: the runtime of task {task} must be a number of seconds from 0, got"
            f" {'null or none' if value is None else repr(value)}"
        )
    return float(value)  # type: ignore[arg-type]


def _carried(
    origin: str,
    parent: RecordedTask,
    child: RecordedTask,
    written: frozenset[str],
    sizes: Mapping[str, set[object]],
) -> float:
    """Bytes of the files that a parent writes and its child reads.

    An edge without such files is one of order alone, unless the child reads what nobody writes:
    then the record lacks who wrote it, and 0 bytes would be a guess.
    """
    common = sorted(parent.writes & child.reads)
    orphans = sorted(child.reads - written)
    if not common and orphans:
        raise WorkflowError(
            f"{origin}: task {child.name} reads {orphans[0]}, which no task writes, and nothing"
            f" that its parent {parent.name} writes: give {parent.name} its output files, or leave"
            " that input out"
        )
    total = 0.0
    for file in common:
        found = sizes.get(file, {None})
        (size,) = found if len(found) == 1 else (None,)
        right = isinstance(size, int | float) and not isinstance(size, bool) and 0 <= size < np.inf
        if not right:
            got = " and ".join(sorted(map(repr, found)))
            raise WorkflowError(
                f"{origin}: the size of {file}, which task {parent.name} writes and task"
                f" {child.name} reads, must be one number of bytes from 0, got {got}"
            )
        total += float(size)  # type: ignore[arg-type]
    return total
