"""Taillard's job shops ta01 to ta80, made from his published seeds, with best known bounds."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import IntArray
from servegym.workflow.graph import Workflow
from servegym.workflow.jobshop import job_shop

NUM_INSTANCES = 80
#: The generator of random numbers: x -> MULTIPLIER x mod MODULUS.
_MULTIPLIER, _MODULUS = 16807, 2**31 - 1
_LONGEST = 99


@dataclass(frozen=True)
class TaillardInstance:
    """One benchmark: its seeds, and between which bounds its least makespan lies.

    Attributes:
        name: `ta01` to `ta80`.
        num_jobs: Jobs, each with one operation on each machine.
        num_machines: Machines.
        time_seed: Of the durations.
        machine_seed: Of the orders of machines.
        lower_bound_s: No schedule is shorter.
        upper_bound_s: The shortest schedule known; the optimum where both bounds are equal.
    """

    name: str
    num_jobs: int
    num_machines: int
    time_seed: int
    machine_seed: int
    lower_bound_s: int
    upper_bound_s: int

    @property
    def size(self) -> str:
        """Jobs times machines, as tables of results group instances."""
        return f"{self.num_jobs} x {self.num_machines}"

    def matrices(self) -> tuple[IntArray, IntArray]:
        """Make the instance as section 5 of the paper says.

        Returns:
            Machines and durations in seconds, in the order of each job,
            `int64[num_jobs, num_machines]` each.
        """
        shape = self.num_jobs, self.num_machines
        draws = _uniform(self.time_seed)
        duration_s = np.array([1 + int(_LONGEST * next(draws)) for _ in range(np.prod(shape))])
        draws = _uniform(self.machine_seed)
        machine = np.tile(np.arange(self.num_machines), (self.num_jobs, 1))
        for row in machine:
            for k in range(self.num_machines):
                other = k + int((self.num_machines - k) * next(draws))
                row[[k, other]] = row[[other, k]]
        return machine, duration_s.reshape(shape)

    def workflow(self) -> Workflow:
        """Return the job shop as a workflow of chains."""
        machine, duration_s = self.matrices()
        return job_shop(machine, duration_s.astype(float), self.name)


def taillard_instance(number: int) -> TaillardInstance:
    """Return an instance by its number, from 1 to 80.

    Raises:
        ConfigError: If there is none of that number.
    """
    if not 1 <= number <= NUM_INSTANCES:
        raise ConfigError(f"instances of taillard are numbered 1 to {NUM_INSTANCES}, got {number}")
    return _instances()[number - 1]


@cache
def _instances() -> tuple[TaillardInstance, ...]:
    text = resources.files("servegym.assets").joinpath("taillard.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return tuple(
        TaillardInstance(row.pop("instance"), **{key: int(x) for key, x in row.items()})
        for row in rows
    )


def _uniform(seed: int) -> Iterator[float]:
    """Random numbers from 0 to 1."""
    while True:
        seed = _MULTIPLIER * seed % _MODULUS
        yield seed / _MODULUS
