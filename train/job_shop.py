"""Small random job shops to train a scheduler on, in the form of a scenario of jobs."""

from __future__ import annotations

import numpy as np

from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec

_LONGEST_S = 99


class RandomJobShops:
    """Shops like Taillard's, but small: each job visits all machines once, durations 1 to 99 s.

    Attributes:
        name: What `--scenario` calls it.
        objective: What is trained for.
        spec: A machine is a device of its own type.
        machines: Range of their number, drawn for every episode.
    """

    name = "job-shop"
    objective = "makespan"

    def __init__(self, machines: tuple[int, int] = (5, 10)) -> None:
        self.machines = machines
        self.spec = FleetSpec(tuple(DeviceType(f"machine{m}") for m in range(machines[1])))

    def draw_jobs(self, seed: int, num_jobs: int) -> tuple[Job, ...]:
        """Draw jobs of the largest shop."""
        rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        return tuple(self._job(rng, self.machines[1]) for _ in range(num_jobs))

    def episode(
        self,
        seed: int,
        *,
        load: float = 1.0,
        num_jobs: int | None = None,
        pool: tuple[Job, ...] | None = None,
    ) -> Episode:
        """Draw a shop; `load` and `pool` change nothing: all jobs are there at the beginning."""
        rng = np.random.default_rng(np.random.SeedSequence(seed))
        num_machines = int(rng.integers(self.machines[0], self.machines[1] + 1))
        jobs = [self._job(rng, num_machines) for _ in range(num_jobs or 10)]
        return Episode.of(jobs, np.arange(num_machines))

    def _job(self, rng: np.random.Generator, num_machines: int) -> Job:
        builder = JobBuilder(self.name, self.spec.task_types)
        last = -1
        for machine in rng.permutation(num_machines).tolist():
            duration_s = float(rng.integers(1, _LONGEST_S + 1))
            stage = builder.task(0, {f"machine{machine}": duration_s})
            if last >= 0:
                builder.edge(last, stage)
            last = stage
        return builder.build()
