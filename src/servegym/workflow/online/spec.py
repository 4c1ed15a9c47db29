"""What an online simulation is given: device types and rules, and one episode of jobs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from servegym.cluster.spec import Faults, ReplicaType
from servegym.errors import ConfigError
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import WorkflowError
from servegym.workflow.job import Job, StageKind


@dataclass(frozen=True)
class DeviceType:
    """One kind of device: it runs tasks, or it is an LLM engine.

    Attributes:
        name: For reports.
        slots: Tasks at the same time, each at full speed; an engine has `max_num_seqs` slots.
        engine: Step cost, KV blocks and limits of an engine; None for a device that runs tasks.
        typical_batch: Sequences that an engine is expected to run together: expected durations of
            LLM stages are stated for such a batch.
    """

    name: str
    slots: int = 1
    engine: ReplicaType | None = None
    typical_batch: int = 8

    def __post_init__(self) -> None:
        if self.slots < 1 or self.typical_batch < 1:
            raise ConfigError(
                f"slots and typical_batch of {self.name} must be at least 1, got {self.slots} and"
                f" {self.typical_batch}"
            )

    @property
    def num_slots(self) -> int:
        """Stages that run at a time."""
        return self.engine.max_num_seqs if self.engine else self.slots


@dataclass(frozen=True)
class FleetSpec:
    """Device types and the rules they share.

    The types without an engine, in their order, are the columns of `Job.duration_s`.

    Attributes:
        types: Device types; devices refer to them by index.
        block_size: Tokens in a KV block.
        move_delay_s: What a task device pays before its first stage of another job or template.
        move_on: Which of the two.
    """

    types: tuple[DeviceType, ...]
    block_size: int = 16
    move_delay_s: float = 0.0
    move_on: Literal["job", "template"] = "job"

    def __post_init__(self) -> None:
        if not self.types:
            raise ConfigError("a fleet needs at least one device type, got none")
        if len(self.types) > 62:
            raise ConfigError(f"a fleet has at most 62 device types, got {len(self.types)}")
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {self.block_size}")
        if not 0 <= self.move_delay_s < math.inf:
            raise ConfigError(f"move_delay_s must be at least 0, got {self.move_delay_s}")

    @property
    def task_types(self) -> tuple[str, ...]:
        """Names of the columns of `Job.duration_s`."""
        return tuple(t.name for t in self.types if t.engine is None)

    def kv_tokens(self, type_idx: int) -> int:
        """KV capacity of a type; 0 if it is no engine."""
        engine = self.types[type_idx].engine
        return engine.num_blocks * self.block_size if engine else 0


@dataclass(frozen=True)
class Links:
    """Time to move data between two devices; within a device it takes none.

    Attributes:
        latency_s: From, to, `float64[num_devices, num_devices]`; 0 on the diagonal.
        s_per_byte: Likewise.
    """

    latency_s: FloatArray
    s_per_byte: FloatArray

    @classmethod
    def uniform(
        cls, num_devices: int, latency_s: float = 0.0, bytes_per_s: float = math.inf
    ) -> Links:
        """Equal links between all devices.

        Raises:
            ConfigError: If the latency is negative or the bandwidth not above 0.
        """
        if not (0 <= latency_s < math.inf and bytes_per_s > 0):
            raise ConfigError(
                f"a link needs a latency of at least 0 s and a bandwidth above 0, got {latency_s}"
                f" and {bytes_per_s}"
            )
        apart = 1.0 - np.eye(num_devices)
        return cls(latency_s * apart, apart / bytes_per_s)


@dataclass(frozen=True)
class Episode:
    """Jobs and when they arrive, devices, and what happens to them.

    Attributes:
        jobs: All different jobs.
        arrival_s: Ascending, `float64[num_jobs]`.
        type_idx: Type of each device, `int64[num_devices]`.
        speed: Factor on the speed of each device, `float64[num_devices]`.
        links: Between the devices; None moves data in no time.
        job_idx: Which of `jobs` arrives each time, `int64[num_jobs]`; None takes them in order.
        faults: Slow-downs, failures and recoveries; `replica` is the device.
        noise_sigma: Standard deviation of the logarithm of a factor on each task's and tool
            call's duration, and on each LLM stage's output length; its mean is 1.
        noise_seed: Of that factor.
        deadline_scale: Factor on the jobs' deadlines.
    """

    jobs: tuple[Job, ...]
    arrival_s: FloatArray
    type_idx: IntArray
    speed: FloatArray
    links: Links | None = None
    job_idx: IntArray | None = None
    faults: Faults = field(default_factory=Faults)
    noise_sigma: float = 0.0
    noise_seed: int = 0
    deadline_scale: float = 1.0

    @classmethod
    def of(
        cls,
        jobs: tuple[Job, ...] | list[Job],
        type_idx: ArrayLike,
        arrival_s: ArrayLike = 0.0,
        **settings: object,
    ) -> Episode:
        """Make an episode from lists; devices have speed 1, and jobs arrive at 0, by default."""
        types = np.array(type_idx, np.int64)
        settings.setdefault("speed", np.ones(len(types)))
        times = np.array(np.broadcast_to(np.asarray(arrival_s, float), len(jobs)))
        return cls(tuple(jobs), times, types, **settings)  # type: ignore[arg-type]

    @property
    def num_jobs(self) -> int:
        """Jobs of the episode."""
        return len(self.arrival_s)

    @property
    def num_devices(self) -> int:
        """Devices of the fleet that was drawn."""
        return len(self.type_idx)

    @property
    def order(self) -> IntArray:
        """Which of the jobs arrives next, `int64[arrivals]`: `job_idx`, written out."""
        return np.arange(len(self.jobs)) if self.job_idx is None else self.job_idx

    def validate(self, spec: FleetSpec) -> None:
        """Refuse what cannot be simulated.

        Raises:
            ConfigError: If devices, links, faults or arrivals do not fit each other.
            WorkflowError: If a stage can run on no device.
        """
        d = self.num_devices
        if d < 1 or self.speed.shape != (d,) or not (self.speed > 0).all():
            raise ConfigError("an episode needs devices, each with a type and a speed above 0")
        if self.type_idx.min() < 0 or self.type_idx.max() >= len(spec.types):
            raise ConfigError(f"type_idx must be within 0..{len(spec.types) - 1}")
        if self.links is not None:
            for values in (self.links.latency_s, self.links.s_per_byte):
                if values.shape != (d, d) or not (np.isfinite(values) & (values >= 0)).all():
                    raise ConfigError(f"links must be tables of {d} x {d} numbers of at least 0")
        if len(self.faults) and not ((self.faults.replica >= 0) & (self.faults.replica < d)).all():
            raise ConfigError(f"faults must name devices 0..{d - 1}")
        n = self.num_jobs
        if n < 1 or (np.diff(self.arrival_s) < 0).any() or not (self.arrival_s >= 0).all():
            raise ConfigError("an episode needs jobs, in order of arrival, from 0 s on")
        if len(self.order) != n or self.order.min() < 0 or self.order.max() >= len(self.jobs):
            raise ConfigError(
                f"job_idx must name one of {len(self.jobs)} jobs for each of {n} arrivals"
            )
        if not 0 <= self.noise_sigma < math.inf:
            raise ConfigError(f"noise_sigma must be at least 0, got {self.noise_sigma}")
        if not self.deadline_scale > 0:
            raise ConfigError(f"deadline_scale must be above 0, got {self.deadline_scale}")


def require_runnable(spec: FleetSpec, job: Job, types: list[int]) -> None:
    """Refuse a job with a stage that none of these device types can run.

    Raises:
        WorkflowError: Naming the first such stage.
    """
    width = len(spec.task_types)
    if job.duration_s.shape[1] != width and (job.kind == StageKind.TASK).any():
        raise WorkflowError(
            f"a job of {job.template} has durations on {job.duration_s.shape[1]} device types,"
            f" but the fleet has {width} that run tasks: {', '.join(spec.task_types)}"
        )
    columns = {t: i for i, t in enumerate(t for t, x in enumerate(spec.types) if not x.engine)}
    mine = [columns[t] for t in types if t in columns]
    most = max((spec.kv_tokens(t) for t in types), default=0)
    for v in np.flatnonzero(job.kind == StageKind.TASK).tolist():
        if not np.isfinite(job.duration_s[v, mine]).any():
            names = ", ".join(spec.types[t].name for t in types)
            raise WorkflowError(
                f"stage {v} of {job.template} can run on none of the fleet's devices: {names}"
            )
    for v in np.flatnonzero(job.kind == StageKind.LLM).tolist():
        need = int(job.prompt_tokens[v] + job.output_tokens[v])
        if need > most:
            raise WorkflowError(
                f"stage {v} of {job.template} needs {need} KV tokens, but the largest engine of"
                f" the fleet holds {most}"
            )
