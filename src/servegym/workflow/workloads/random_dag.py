"""The random DAGs of the HEFT paper as jobs."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from servegym.workflow.generate import RandomDag
from servegym.workflow.job import Job
from servegym.workflow.workloads.family import Family
from servegym.workflow.workloads.from_workflow import job_from_workflow


class RandomDagJob(Family):
    """One layered DAG of tasks, of Topcuoglu, Hariri and Wu (2002), section 5.2.

    Attributes:
        device_types: What durations are drawn for.
        num_tasks: Of each job.
        shape: About `sqrt(num_tasks) / shape` levels of `sqrt(num_tasks) * shape` tasks.
        out_degree: Children that a task is given.
        ccr: Mean transfer time, over a link of `link_bytes_per_s`, over mean duration.
        heterogeneity: Spread of a task's durations over the types, a share of their mean.
        mean_duration_s: Of tasks.
        link_bytes_per_s: Bandwidth of the links that `ccr` is about.
    """

    labels: ClassVar[tuple[str, ...]] = ("task",)

    kind: Literal["random-dag"] = "random-dag"
    device_types: tuple[str, ...] = Field(("a", "b", "c", "d"), min_length=1)
    num_tasks: int = Field(50, ge=1)
    shape: float = Field(1.0, gt=0)
    out_degree: int = Field(3, ge=1)
    ccr: float = Field(1.0, ge=0)
    heterogeneity: float = Field(1.0, ge=0, le=2)
    mean_duration_s: float = Field(1.0, gt=0)
    link_bytes_per_s: float = Field(1.25e9, gt=0)

    def job(self, rng: np.random.Generator) -> Job:
        """Draw one job, a random DAG."""
        dag = RandomDag(
            num_tasks=self.num_tasks,
            num_devices=len(self.device_types),
            shape=self.shape,
            out_degree=self.out_degree,
            ccr=self.ccr,
            heterogeneity=self.heterogeneity,
            mean_duration_s=self.mean_duration_s,
        )
        flow = dag.sample(int(rng.integers(2**62)))
        return job_from_workflow(
            flow,
            "random-dag",
            device_types=self.device_types,
            link_bytes_per_s=self.link_bytes_per_s,
        )
