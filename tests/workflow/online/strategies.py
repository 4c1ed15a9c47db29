from __future__ import annotations

import numpy as np

from servegym.cluster.spec import Faults, ReplicaType
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec, Links
from servegym.workflow.online.state import WAIT

from ...cluster.strategies import random_grid  # noqa: TID252 - tests are no package


def random_spec(rng: np.random.Generator) -> FleetSpec:
    num_task, num_engine = [(1, 0), (2, 0), (0, 1), (0, 2), (1, 1), (2, 2)][rng.integers(6)]
    seqs = int(rng.choice([1, 2, 5]))
    types = [DeviceType(f"P{i}", slots=int(rng.choice([1, 1, 3]))) for i in range(num_task)]
    for i in range(num_engine):
        engine = ReplicaType(
            f"E{i}",
            random_grid(rng),
            num_blocks=int(rng.choice([30, 60, 400])),
            max_num_batched_tokens=int(max(seqs + 1, rng.choice([8, 32, 128]))),
            max_num_seqs=seqs,
        )
        types.append(DeviceType(f"E{i}", engine=engine, typical_batch=int(rng.integers(1, 4))))
    order = rng.permutation(len(types))
    return FleetSpec(
        tuple(types[i] for i in order),
        block_size=4,
        move_delay_s=float(rng.choice([0.0, 0.3])),
        move_on=("job", "template")[rng.integers(2)],
    )


def random_job(rng: np.random.Generator, spec: FleetSpec, name: str) -> Job:
    builder = JobBuilder(name, spec.task_types)
    engines = len(spec.types) > len(spec.task_types)
    kinds = ["tool"] + ["task"] * (2 * bool(spec.task_types)) + ["llm"] * (3 * engines)
    grain = rng.choice([0.0, 0.25])  # coarse numbers make ties
    count = int(rng.integers(1, 9))
    prompts = []
    for i in range(count):
        kind, hidden = kinds[rng.integers(len(kinds))], bool(rng.random() < 0.2)
        prompts.append(0)
        if kind == "tool":
            tool_s = float(rng.choice([0.0, 0.5, rng.exponential(0.5)]))
            builder.tool(i, tool_s, float(rng.exponential(0.5)), hidden=hidden)
        elif kind == "task":
            times = rng.uniform(0.1, 2.0, len(spec.task_types))
            if grain:
                times = np.round(times / grain) * grain
            names = list(spec.task_types)
            if len(names) > 1 and rng.random() < 0.3:
                names = [names[rng.integers(len(names))]]
            builder.task(i, dict(zip(names, times.tolist(), strict=False)), hidden=hidden)
        else:
            prompts[-1] = int(rng.integers(1, 70))
            output = int(rng.choice([1, 2, 8, rng.integers(1, 40)]))
            builder.llm(i, prompts[-1], output, float(rng.integers(1, 40)), hidden=hidden)
    for child in range(1, count):
        for parent in rng.permutation(child)[: rng.integers(0, 3)].tolist():
            builder.edge(
                parent,
                child,
                data_bytes=float(rng.choice([0.0, 1.0, 3.0])),
                shared_tokens=int(rng.integers(0, prompts[child] + 1)),
            )
    deadline = float(rng.choice([np.inf, 1.0, 4.0]))
    return builder.build(deadline, weight=float(rng.integers(1, 4)))


def random_faults(rng: np.random.Generator, num_devices: int) -> Faults:
    rows = []
    for d in range(num_devices):
        t = 0.0
        for _ in range(int(rng.integers(0, 3))):
            t += rng.exponential(2.0)
            if rng.random() < 0.5:
                rows.append((t, d, FAULT_SLOW, rng.uniform(0.2, 2.0)))
            else:
                rows.append((t, d, FAULT_DOWN, 0.0))
                t += rng.exponential(1.0)
                rows.append((t, d, FAULT_UP, 0.0))
    rows.sort()
    return Faults(
        np.array([x[0] for x in rows], float),
        np.array([x[1] for x in rows], np.int16),
        np.array([x[2] for x in rows], np.int8),
        np.array([x[3] for x in rows], float),
    )


def random_case(seed: int) -> tuple[FleetSpec, Episode]:
    rng = np.random.default_rng(seed)
    spec = random_spec(rng)
    devices = list(range(len(spec.types))) + rng.integers(0, len(spec.types), 2).tolist()
    rng.shuffle(devices)
    d = len(devices)
    jobs = tuple(random_job(rng, spec, f"kind{rng.integers(3)}") for _ in range(4))
    n = int(rng.integers(1, 14))
    gaps = rng.exponential(rng.choice([0.05, 0.5, 3.0]), n) * (rng.random(n) < 0.8)
    apart = 1.0 - np.eye(d)
    links = Links(apart * rng.uniform(0, 0.3, (d, d)), apart * rng.uniform(0, 0.2, (d, d)))
    return spec, Episode(
        jobs,
        np.cumsum(gaps),
        np.array(devices, np.int64),
        np.where(rng.random(d) < 0.5, 1.0, rng.uniform(0.5, 2.0, d)),
        links=links if rng.random() < 0.8 else None,
        job_idx=rng.integers(0, 4, n),
        faults=random_faults(rng, d) if rng.random() < 0.6 else Faults(),
        noise_sigma=float(rng.choice([0.0, 0.3])),
        noise_seed=int(rng.integers(1 << 62)),
        deadline_scale=float(rng.choice([1.0, 0.5])),
    )


def choose(decision: int, startable: list[int], may_wait: bool) -> int:
    """Pick an action from the number of the decision, nothing else."""
    rng = np.random.default_rng((decision, len(startable)))
    if not startable or (may_wait and rng.random() < 0.3):
        return WAIT
    return int(startable[rng.integers(len(startable))])
