"""Many jobs as arrays, from which episodes are put together in compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from servegym.typing import FloatArray, IntArray
from servegym.workflow.job import Job
from servegym.workflow.online.state import EDGE_DTYPE, Records

#: Edge ranges count within the job.
POOL_STAGE_DTYPE = np.dtype(
    [
        ("kind", "i8"),
        ("label", "i8"),
        ("hidden", "i8"),
        ("prompt", "i8"),
        ("output", "i8"),
        ("expected_output", "f8"),
        ("tool_s", "f8"),
        ("expected_tool_s", "f8"),
        ("succ_first", "i8"),
        ("succ_stop", "i8"),
        ("pred_first", "i8"),
        ("pred_stop", "i8"),
    ],
    align=True,
)
POOL_JOB_DTYPE = np.dtype(
    [
        ("first_stage", "i8"),
        ("num_stages", "i8"),
        ("first_edge", "i8"),
        ("num_edges", "i8"),
        ("template", "i8"),
        ("deadline_s", "f8"),
        ("weight", "f8"),
    ],
    align=True,
)


class Pool(NamedTuple):
    """Jobs one behind the other; numbers of stages and edges count within each job."""

    job: Records  # POOL_JOB_DTYPE[num_jobs]
    stage: Records  # POOL_STAGE_DTYPE[N]
    edge: Records  # EDGE_DTYPE[M]; by parent
    pred: IntArray  # [M] edges by child
    duration_s: FloatArray  # [N, C]


def make_pool(jobs: Sequence[Job], num_columns: int) -> Pool:
    """Pack jobs; templates are numbered in order of their names."""
    names = {name: i for i, name in enumerate(sorted({job.template for job in jobs}))}
    job_rows = np.zeros(len(jobs), POOL_JOB_DTYPE)
    job_rows["num_stages"] = [job.num_stages for job in jobs]
    job_rows["num_edges"] = [job.num_edges for job in jobs]
    job_rows["template"] = [names[job.template] for job in jobs]
    job_rows["deadline_s"] = [job.deadline_s for job in jobs]
    job_rows["weight"] = [job.weight for job in jobs]
    for first, count in (("first_stage", "num_stages"), ("first_edge", "num_edges")):
        job_rows[first] = np.cumsum(job_rows[count]) - job_rows[count]
    stages = np.zeros(int(job_rows["num_stages"].sum()), POOL_STAGE_DTYPE)
    edges = np.zeros(max(1, int(job_rows["num_edges"].sum())), EDGE_DTYPE)
    pred = np.zeros(len(edges), np.int64)
    duration_s = np.full((len(stages), max(1, num_columns)), np.inf)
    for row, job in zip(job_rows, jobs, strict=True):
        mine = slice(row["first_stage"], row["first_stage"] + row["num_stages"])
        rows = stages[mine]
        rows["kind"] = job.kind
        rows["label"] = job.label
        rows["hidden"] = job.hidden
        rows["prompt"] = job.prompt_tokens
        rows["output"] = job.output_tokens
        rows["expected_output"] = job.expected_output_tokens
        rows["tool_s"] = job.tool_s
        rows["expected_tool_s"] = job.expected_tool_s
        if job.duration_s.shape[1]:
            duration_s[mine, : job.duration_s.shape[1]] = job.duration_s
        between = slice(row["first_edge"], row["first_edge"] + row["num_edges"])
        edges["parent"][between] = job.parent
        edges["child"][between] = job.child
        edges["data_bytes"][between] = job.data_bytes
        edges["shared"][between] = job.shared_tokens
        by_child = np.argsort(job.child, kind="stable")
        pred[between] = by_child
        numbers = np.arange(job.num_stages + 1)
        for name, ends in (("succ", job.parent), ("pred", job.child[by_child])):
            at = np.searchsorted(ends, numbers)
            rows[f"{name}_first"], rows[f"{name}_stop"] = at[:-1], at[1:]
    return Pool(job_rows, stages, edges, pred, duration_s)
