"""Random workflows: the layered DAGs of the HEFT paper, and job shops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import IntArray
from servegym.workflow.graph import Workflow, make_workflow
from servegym.workflow.jobshop import job_shop


@dataclass(frozen=True)
class RandomDag:
    """Random DAGs with the parameters of Topcuoglu, Hariri and Wu (2002), section 5.2.

    Every task but those of the first level has a parent on the level above, so that the number of
    levels is the length of the longest chain.
    """

    num_tasks: int = 100
    num_devices: int = 8
    shape: float = 1.0
    """About `sqrt(num_tasks) / shape` levels of `sqrt(num_tasks) * shape` tasks."""
    out_degree: int = 3
    """Children that a task is given, fewer where fewer tasks lie below."""
    ccr: float = 1.0
    """Communication to computation: mean transfer time over mean duration."""
    heterogeneity: float = 1.0
    """Spread of a task's durations over the devices: each within this share of their mean."""
    mean_duration_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_tasks", "num_devices", "out_degree"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("shape", "mean_duration_s"):
            if not 0.0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")
        if not 0.0 <= self.ccr < np.inf:
            raise ConfigError(f"ccr must be at least 0, got {self.ccr:g}")
        if not 0.0 <= self.heterogeneity <= 2.0:
            raise ConfigError(f"heterogeneity must be from 0 to 2, got {self.heterogeneity:g}")

    def sample(self, seed: int) -> Workflow:
        """Draw a workflow; the same seed gives the same one."""
        rng = np.random.default_rng(seed)
        level = self._levels(rng)
        edges = self._edges(rng, level)
        mean_s = rng.uniform(0.0, 2.0 * self.mean_duration_s, self.num_tasks)
        spread = rng.uniform(
            1.0 - self.heterogeneity / 2,
            1.0 + self.heterogeneity / 2,
            (self.num_tasks, self.num_devices),
        )
        transfer_s = rng.uniform(0.0, 2.0 * self.ccr * self.mean_duration_s, len(edges))
        return make_workflow(
            [f"t{v}" for v in range(self.num_tasks)],
            [f"d{p}" for p in range(self.num_devices)],
            mean_s[:, None] * spread,
            edges,
            transfer_s=transfer_s,
            name=f"random-{self.num_tasks}-{seed}",
        )

    def _levels(self, rng: np.random.Generator) -> IntArray:
        """Level of each task, `int64[num_tasks]`, ascending from 0 without holes."""
        mean_height = np.sqrt(self.num_tasks) / self.shape
        height = int(np.clip(rng.integers(1, 2 * mean_height + 1), 1, self.num_tasks))
        width = rng.uniform(0.0, 2.0, height) + 1e-9
        # one task a level, the rest in proportion to random widths
        extra = rng.multinomial(self.num_tasks - height, width / width.sum())
        return np.repeat(np.arange(height), extra + 1)

    def _edges(self, rng: np.random.Generator, level: IntArray) -> IntArray:
        """Parent and child of each edge, `int64[num_edges, 2]`."""
        first = np.searchsorted(level, np.arange(level[-1] + 2))
        found = set()
        for v in range(first[1], self.num_tasks):
            above = first[level[v] - 1], first[level[v]]
            found.add((int(rng.integers(*above)), v))
        for v in range(first[level[-1]]):
            below = first[level[v] + 1]
            for w in rng.integers(below, self.num_tasks, self.out_degree):
                found.add((v, int(w)))
        return np.array(sorted(found), np.int64).reshape(-1, 2)


def random_job_shop(num_jobs: int, num_machines: int, seed: int) -> Workflow:
    """Draw a job shop as Taillard (1993) did: durations from 1 to 99, machines in random order."""
    rng = np.random.default_rng(seed)
    duration_s = rng.integers(1, 100, (num_jobs, num_machines)).astype(float)
    machine = rng.permuted(np.tile(np.arange(num_machines), (num_jobs, 1)), axis=1)
    return job_shop(machine, duration_s, f"job-shop-{num_jobs}x{num_machines}-{seed}")
