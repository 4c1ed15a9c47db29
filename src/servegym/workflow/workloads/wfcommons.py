"""Recorded scientific workflows of WfCommons as jobs."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.documents import load_json
from servegym.errors import WorkloadError
from servegym.workflow.graph import Workflow
from servegym.workflow.job import Job
from servegym.workflow.wfformat import (
    Fleet,
    recorded_tasks,
    workflow_from_wfformat,
    workflow_on_fleet,
)
from servegym.workflow.workloads.family import Family
from servegym.workflow.workloads.from_workflow import job_from_workflow
from servegym.workloads.cells import finite

_NODES = {"workflow", "task", "name", "runtime_s", "input_bytes", "output_bytes"}
_EDGES = {"workflow", "parent", "child"}


class Record(NamedTuple):
    """A recorded workflow, and numbers of the programs that its tasks ran."""

    workflow: Workflow
    labels: tuple[int, ...]


class WfCommons(Family):
    """One recorded workflow, drawn from a folder of them.

    A task takes its recorded time over the speed of the device's type. The template is the record's
    name; labels number the programs of all records by name, so that equal labels ran the same one.

    Attributes:
        path: Folder with WfFormat files (`*.json`), or with two tables `*nodes*.parquet` (columns
            workflow, task, name, runtime_s, input_bytes, output_bytes) and `*edges*.parquet`
            (workflow, parent, child), whose edges carry at most what the parent wrote and the
            child read.
        device_types: Names of the types.
        speeds: Of each, against the machine of the record.
        min_tasks: Smaller records are left out.
        max_tasks: Larger records are left out.
        time_scale: All times are multiplied by it: records last minutes to days.
    """

    labels: ClassVar[tuple[str, ...]] = ()

    kind: Literal["wfcommons"] = "wfcommons"
    path: str
    device_types: tuple[str, ...] = Field(("x1", "x2", "x4"), min_length=1)
    speeds: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 2.0, 4.0)
    min_tasks: int = Field(1, ge=1)
    max_tasks: int = Field(1000, ge=1)
    time_scale: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check_types(self) -> Self:
        if len(self.speeds) != len(self.device_types):
            raise ValueError(
                "speeds and device_types need one entry a type each, got"
                f" {len(self.speeds)} and {len(self.device_types)}"
            )
        return self

    def job(self, rng: np.random.Generator) -> Job:
        """Draw the job of one record.

        Raises:
            WorkloadError: If the folder holds none of the sizes asked for, or cannot be read.
        """
        jobs = self._records()
        if not jobs:
            raise WorkloadError(
                f"{self.path} holds no workflow of {self.min_tasks} to {self.max_tasks} tasks"
            )
        return self._job(jobs[int(rng.integers(len(jobs)))])

    def jobs(self) -> list[Job]:
        """Return every record of the sizes asked for, in order of the files."""
        return [self._job(record) for record in self._records()]

    def _records(self) -> list[Record]:
        fleet = Fleet(tuple(speed / self.time_scale for speed in self.speeds))
        return [
            record
            for record in read_records(Path(self.path), fleet)
            if self.min_tasks <= record.workflow.num_tasks <= self.max_tasks
        ]

    def _job(self, record: Record) -> Job:
        flow = record.workflow
        return job_from_workflow(
            flow, flow.name, labels=record.labels, device_types=self.device_types
        )


@lru_cache(maxsize=4)
def read_records(folder: Path, fleet: Fleet) -> tuple[Record, ...]:
    """Read all recorded workflows of a folder.

    Args:
        folder: See `WfCommons.path`.
        fleet: Devices to run them on.

    Raises:
        WorkloadError: If there are none, or the tables lack a column.
        WorkflowError: If a record is malformed.
    """
    tables = [sorted(folder.glob(f"*{part}*.parquet")) for part in ("nodes", "edges")]
    if all(len(found) == 1 for found in tables):
        read = _from_tables(tables[0][0], tables[1][0], fleet)
    else:
        read = [_from_file(file, fleet) for file in sorted(folder.glob("*.json"))]
    if not read:
        raise WorkloadError(
            f"{folder} must hold WfFormat files (*.json) or one table *nodes*.parquet and one"
            " *edges*.parquet"
        )
    programs = sorted({name for _, names in read for name in names})
    label = {name: number for number, name in enumerate(programs)}
    return tuple(Record(flow, tuple(label[name] for name in names)) for flow, names in read)


def _from_file(file: Path, fleet: Fleet) -> tuple[Workflow, list[str]]:
    try:
        document = load_json(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise WorkloadError(f"{file} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise WorkloadError(f"{file} is not WfFormat: it must be an object")
    flow = workflow_from_wfformat(document, file.name, fleet)
    tasks, _ = recorded_tasks(document, file.name)
    return flow, [_program(task.program) for task in tasks]


def _from_tables(
    nodes_file: Path, edges_file: Path, fleet: Fleet
) -> list[tuple[Workflow, list[str]]]:
    nodes, edges = _columns(nodes_file, _NODES), _columns(edges_file, _EDGES)
    pairs = _by_workflow(edges["workflow"])
    records = _by_workflow(nodes["workflow"])
    for name in pairs.keys() - records.keys():
        raise WorkloadError(f"{edges_file.name} has edges of {name}, which {nodes_file.name} lacks")
    made = []
    for name, mine in records.items():
        place = {nodes["task"][i]: v for v, i in enumerate(mine)}
        for i in pairs.get(name, []):
            for end in (edges["parent"][i], edges["child"][i]):
                if end not in place:
                    raise WorkloadError(
                        f"{edges_file.name}: an edge of {name} names task {end}, which"
                        f" {nodes_file.name} lacks"
                    )
        ends = sorted(
            {(place[edges["parent"][i]], place[edges["child"][i]]) for i in pairs.get(name, [])}
        )

        def measure(task: int, key: str, mine: list[int] = mine, name: str = name) -> float:
            return _measure(nodes_file.name, name, nodes, mine[task], key)

        flow = workflow_on_fleet(
            name,
            [str(nodes["task"][i]) for i in mine],
            [measure(v, "runtime_s") for v in range(len(mine))],
            ends,
            # sizes that no edge needs may be missing, such as what the first task read
            [min(measure(u, "output_bytes"), measure(v, "input_bytes")) for u, v in ends],
            fleet,
        )
        made.append((flow, [_program(str(nodes["name"][i])) for i in mine]))
    return made


def _measure(file: str, flow: str, nodes: dict[str, list[Any]], row: int, key: str) -> float:
    where = f"{file}, task {nodes['task'][row]} of {flow}"
    value = finite(where, key, nodes[key][row])
    if value < 0:
        raise WorkloadError(f"{where}, column {key}: must be at least 0, got {value:g}")
    return value


def _columns(file: Path, needed: set[str]) -> dict[str, list[Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise WorkloadError("tables need pyarrow: pip install pyarrow") from error
    try:
        table = parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise WorkloadError(f"cannot read {file.name}: it is no Parquet file") from error
    missing = sorted(needed - set(table.column_names))
    if missing:
        raise WorkloadError(f"{file.name} has no column {', '.join(missing)}")
    columns: dict[str, list[Any]] = table.to_pydict()
    return columns


def _by_workflow(names: list[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        rows.setdefault(name, []).append(i)
    return rows


def _program(task: str) -> str:
    """Name of a task without the number that tells it from others of its kind."""
    return re.sub(r"[_\-.]?(ID)?\d+$", "", task) or task
