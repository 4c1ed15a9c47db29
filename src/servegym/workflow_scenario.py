"""A scenario of jobs: fleet, workload, arrivals, disturbances and objective in one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import yaml
from pydantic import Field, field_validator, model_validator

from servegym.costs.step import StepCost
from servegym.documents import load_yaml
from servegym.errors import ConfigError
from servegym.scenario.config import Config, Count, Factor, ascending
from servegym.scenario.disturbances import FailSlowConfig, FailStopConfig, draw_faults
from servegym.scenario.files import bundled_names, load
from servegym.scenario.fleet import (
    EngineConfig,
    FleetEntry,
    draw_fleet,
    replica_type,
    step_cost,
)
from servegym.typing import IntArray
from servegym.workflow.job import Job
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec, Links
from servegym.workflow.workloads.mixture import Mixture
from servegym.workflow.workloads.registry import WorkloadConfig
from servegym.workloads.config import ArrivalConfig

_FOLDER = "workflows"


class EngineEntry(Config):
    """Equal LLM engines; a pair of numbers is a range, drawn anew for every episode."""

    gpu: str
    count: Count | tuple[Count, Count] = 1
    tp: int = Field(1, ge=1)
    speed: Factor | tuple[Factor, Factor] = 1.0
    num_blocks: int | None = Field(None, ge=1)
    calibration: str | None = None
    typical_batch: int = Field(8, ge=1)

    _check_ranges = field_validator("count", "speed")(ascending)


class DeviceEntry(Config):
    """Equal devices that run tasks; `name` is the device type that the workload has times for."""

    name: str
    count: Count | tuple[Count, Count] = 1
    slots: int = Field(1, ge=1)
    speed: Factor | tuple[Factor, Factor] = 1.0

    _check_ranges = field_validator("count", "speed")(ascending)


class LinkConfig(Config):
    """The link between any two devices."""

    latency_s: float = Field(0.0, ge=0)
    gb_per_s: float = Field(1.25, gt=0)


class JobDisturbances(Config):
    """What makes life hard; everything is off by default."""

    noise_sigma: float = Field(0.0, ge=0)
    fail_slow: FailSlowConfig = FailSlowConfig()
    fail_stop: FailStopConfig = FailStopConfig()


class WorkflowScenario(Config):
    """Everything an episode of jobs is drawn from."""

    kind: Literal["workflow"] = "workflow"
    name: str
    description: str = ""
    model: str = "Llama-3.1-70B"
    precision: Literal["bf16", "fp8"] = "bf16"
    engine: EngineConfig = EngineConfig()
    engines: tuple[EngineEntry, ...] = ()
    devices: tuple[DeviceEntry, ...] = ()
    workload: Annotated[WorkloadConfig | Mixture, Field(discriminator="kind")]
    rate_jobs_per_s: float | None = Field(None, gt=0)
    arrivals: ArrivalConfig = ArrivalConfig()
    deadline_scale: float = Field(1.0, gt=0)
    links: LinkConfig = LinkConfig()
    move_delay_s: float = Field(0.0, ge=0)
    move_on: Literal["job", "template"] = "job"
    disturbances: JobDisturbances = JobDisturbances()
    objective: Literal["jct", "makespan", "deadline"] = "jct"
    num_jobs: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _check_fleet(self) -> Self:
        if not self.engines and not self.devices:
            raise ValueError("engines and devices are both missing: name at least one")
        if self.engine.retain_kv_s > 0:
            raise ValueError(
                f"retain_kv_s is {self.engine.retain_kv_s}, but engines of jobs do not follow "
                "single KV blocks: leave it out"
            )
        names = [entry.name for entry in self.devices]
        known = getattr(self.workload, "device_types", None)
        if len(set(names)) < len(names):
            raise ValueError(f"devices must have different names, got {', '.join(names)}")
        if known is not None and names != [name for name in known if name in names]:
            raise ValueError(
                f"devices must be among the workload's device_types ({', '.join(known)}), in that"
                f" order, got {', '.join(names)}"
            )
        return self

    @cached_property
    def spec(self) -> FleetSpec:
        """Device types: those that run tasks by the workload's columns, then the engines."""
        listed = {entry.name: entry for entry in self.devices}
        columns = getattr(self.workload, "device_types", tuple(listed))
        tasks = [
            DeviceType(name, slots=listed[name].slots if name in listed else 1) for name in columns
        ]
        engines = [
            DeviceType(
                f"{entry.gpu} x{entry.tp}",
                engine=replica_type(_fleet_entry(entry), self.model, self.precision, self.engine),
                typical_batch=entry.typical_batch,
            )
            for entry in self.engines
        ]
        return FleetSpec(
            (*tasks, *engines),
            block_size=self.engine.block_size,
            move_delay_s=self.move_delay_s,
            move_on=self.move_on,
        )

    def step_costs(self) -> dict[str, StepCost]:
        """Return what a step costs on each kind of engine, by its GPU.

        Raises:
            ConfigError: If a calibration file is wrong, or made for others.
        """
        return {
            entry.gpu: step_cost(_fleet_entry(entry), self.model, self.precision)
            for entry in self.engines
        }

    @property
    def max_devices(self) -> int:
        """Largest fleet an episode can have."""
        entries: tuple[DeviceEntry | EngineEntry, ...] = (*self.devices, *self.engines)
        counts = [entry.count for entry in entries]
        return sum(c if isinstance(c, int) else c[1] for c in counts)

    def draw_jobs(self, seed: int, num_jobs: int) -> tuple[Job, ...]:
        """Draw different jobs, as a pool for many episodes or for one."""
        rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
        return tuple(self.workload.job(rng) for _ in range(num_jobs))

    def episode(
        self,
        seed: int,
        *,
        load: float = 1.0,
        num_jobs: int | None = None,
        pool: tuple[Job, ...] | None = None,
    ) -> Episode:
        """Draw an episode; the jobs of a seed are the same under every policy.

        Args:
            seed: Of all randomness of the episode.
            load: Multiplies the arrival rate.
            num_jobs: Instead of the scenario's own.
            pool: Jobs to draw from, with replacement; without it they are drawn anew.

        Raises:
            ConfigError: If the load or the number of jobs is impossible.
        """
        if not 0 < load < np.inf:
            raise ConfigError(f"load must be above 0 and finite, got {load}")
        n = self.num_jobs if num_jobs is None else num_jobs
        if n < 1:
            raise ConfigError(f"num_jobs must be at least 1, got {num_jobs}")
        which, times, fleet, faults, noise = np.random.SeedSequence(seed).spawn(5)
        jobs, job_idx = pool, None
        if jobs is None:
            jobs = self.draw_jobs(seed, n)
        else:
            job_idx = np.random.default_rng(which).integers(0, len(jobs), n)
        arrival_s = np.zeros(n)
        if self.rate_jobs_per_s is not None:
            rate = self.rate_jobs_per_s * load
            arrival_s = self.arrivals.draw(np.random.default_rng(times), n, rate)
        type_idx, speed = self._fleet(np.random.default_rng(fleet))
        d = len(type_idx)
        trouble = self.disturbances
        # long enough for the drain of an overloaded fleet too
        until_s = 2.0 * float(arrival_s[-1]) + 600.0
        return Episode(
            jobs,
            arrival_s,
            type_idx,
            speed,
            links=Links.uniform(d, self.links.latency_s, self.links.gb_per_s * 1e9),
            job_idx=job_idx,
            faults=draw_faults(
                trouble.fail_slow, trouble.fail_stop, np.random.default_rng(faults), d, until_s
            ),
            noise_sigma=trouble.noise_sigma,
            noise_seed=int(noise.generate_state(1, np.uint64)[0] >> np.uint64(1)),
            deadline_scale=self.deadline_scale,
        )

    def _fleet(self, rng: np.random.Generator) -> tuple[IntArray, np.ndarray]:
        columns = self.spec.task_types
        tasks = ((columns.index(entry.name), entry) for entry in self.devices)
        types, speeds = draw_fleet(rng, [*tasks, *enumerate(self.engines, len(columns))])
        return np.array(types, np.int64), np.array(speeds, np.float64)


def _fleet_entry(entry: EngineEntry) -> FleetEntry:
    return FleetEntry(**entry.model_dump(exclude={"typical_batch"}))


def workflow_scenario_names() -> list[str]:
    """Names of the bundled workflow scenarios."""
    return bundled_names(_FOLDER)


def is_workflow_scenario(name_or_path: str) -> bool:
    """Whether this names a bundled workflow scenario, or a YAML file with `kind: workflow`."""
    path = Path(name_or_path)
    if not name_or_path.endswith((".yaml", ".yml")):
        return name_or_path in workflow_scenario_names()
    if not path.is_file():
        return False
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # told when it is read as a scenario
    return isinstance(data, Mapping) and data.get("kind") == "workflow"


def load_workflow_scenario(name_or_path: str | Path) -> WorkflowScenario:
    """Load a bundled workflow scenario by name, or one of your own by the path of its YAML file.

    Raises:
        ConfigError: If there is none, or a key or value in it is not allowed.
    """
    return load(name_or_path, _FOLDER, "workflow scenario", WorkflowScenario)
