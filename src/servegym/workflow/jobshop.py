"""Job shops in the standard text format: each operation runs on one machine only."""

from __future__ import annotations

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Workflow, WorkflowError, make_workflow


def job_shop(machine: IntArray, duration_s: FloatArray, name: str = "job shop") -> Workflow:
    """Turn a job shop into a workflow: one chain a job, no time between machines.

    Args:
        machine: Of each operation, in the order of its job, `int64[num_jobs, num_operations]`.
        duration_s: Likewise.
        name: Shown in results.
    """
    jobs, length = machine.shape
    work_s = np.full((jobs * length, int(machine.max()) + 1), np.inf)
    work_s[np.arange(jobs * length), machine.ravel()] = duration_s.ravel()
    first = np.arange(jobs * length).reshape(jobs, length)[:, :-1].ravel()
    return make_workflow(
        [f"job{j}-{k}" for j in range(jobs) for k in range(length)],
        [f"machine{p}" for p in range(work_s.shape[1])],
        work_s,
        np.stack([first, first + 1], 1),
        name=name,
    )


def job_shop_from_text(text: str, origin: str) -> Workflow:
    """Read the standard format.

    Lines that begin with # are skipped; then the numbers of jobs and machines, then one line a job
    with machine (from 0) and duration of each operation.

    Raises:
        WorkflowError: If the text is something else.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        rows = [[float(word) for word in line.split()] for line in lines]
    except ValueError as error:
        raise WorkflowError(
            f"{origin} is no DAG: give a JSON file (servegym-dag-1 or WfFormat) or a job shop of"
            f" numbers; {error}"
        ) from error
    if not rows or len(rows[0]) != 2 or not all(x >= 1 and x.is_integer() for x in rows[0]):
        raise WorkflowError(f"{origin} must begin with the numbers of jobs and machines")
    num_jobs, num_machines = (int(x) for x in rows[0])
    if len(rows) != num_jobs + 1:
        raise WorkflowError(f"{origin} promises {num_jobs} jobs and has {len(rows) - 1}")
    for j, row in enumerate(rows[1:]):
        if len(row) != 2 * num_machines:
            raise WorkflowError(
                f"{origin}: job {j} must have {num_machines} pairs of machine and duration, got"
                f" {len(row)} numbers"
            )
        if sorted(row[0::2]) != list(range(num_machines)):
            raise WorkflowError(
                f"{origin}: job {j} must visit each machine from 0 to {num_machines - 1} once"
            )
    pairs = np.array(rows[1:]).reshape(num_jobs, num_machines, 2)
    return job_shop(pairs[:, :, 0].astype(np.int64), pairs[:, :, 1], origin)


def require_job_shop(workflow: Workflow, rule: str) -> None:
    """Refuse a workflow that is no job shop: chains of tasks with one device each."""
    g = workflow.graph
    chains = max(np.diff(g.succ_start).max(), np.diff(g.pred_start).max()) <= 1
    if not chains or (np.isfinite(g.duration_s).sum(1) != 1).any():
        raise ConfigError(
            f"{rule} is a job-shop rule: {workflow.name} must be chains of tasks that run on one"
            " device each"
        )
