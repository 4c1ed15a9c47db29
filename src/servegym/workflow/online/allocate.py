"""Making the online simulator's arrays and filling them from episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from servegym.cluster.allocate import make_params as make_engine_params
from servegym.cluster.spec import ClusterSpec, ReplicaType
from servegym.cluster.state import FAULT_DTYPE
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.workflow.online.loading import load_jobs
from servegym.workflow.online.pool import Pool
from servegym.workflow.online.spec import DeviceType, Episode, FleetSpec
from servegym.workflow.online.state import (
    DEVICE_DTYPE,
    EDGE_DTYPE,
    ENTRY_DTYPE,
    ENV_DTYPE,
    JOB_DTYPE,
    MOVE_JOB,
    MOVE_NEVER,
    MOVE_TEMPLATE,
    STAGE_DTYPE,
    TRUTH_DTYPE,
    Params,
    State,
)


class Capacity(NamedTuple):
    """Sizes of the state arrays."""

    num_envs: int
    stages: int
    jobs: int
    edges: int
    devices: int
    faults: int

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Capacity:
        """Return the sizes that hold every one of `episodes`."""
        sizes = [_sizes(episode) for episode in episodes]
        return cls(len(episodes), *(max(column) for column in zip(*sizes, strict=True)))

    def covers(self, episode: Episode) -> bool:
        """Whether an environment of these sizes can play `episode`."""
        return all(need <= has for need, has in zip(_sizes(episode), self[1:], strict=True))


def _sizes(episode: Episode) -> tuple[int, int, int, int, int]:
    order = episode.order
    stages = np.array([job.num_stages for job in episode.jobs])[order].sum()
    edges = np.array([job.num_edges for job in episode.jobs])[order].sum()
    faults = max(1, len(episode.faults))
    return int(stages), episode.num_jobs, max(1, int(edges)), episode.num_devices, faults


def make_params(spec: FleetSpec) -> Params:
    """Stack the device types and rules of a fleet into arrays."""
    engines = [t.engine for t in spec.types if t.engine]
    numbers = np.cumsum([t.engine is not None for t in spec.types]) - 1
    columns = np.cumsum([t.engine is None for t in spec.types]) - 1
    is_engine = np.array([t.engine is not None for t in spec.types])
    moves = {"job": MOVE_JOB, "template": MOVE_TEMPLATE}
    rules = ClusterSpec(tuple(engines) or (_no_engine(),), block_size=spec.block_size)
    return Params(
        engine=make_engine_params(rules, record=False),
        engine_idx=np.where(is_engine, numbers, -1).astype(np.int64),
        column=np.where(is_engine, -1, columns).astype(np.int64),
        slots=np.array([t.num_slots for t in spec.types], np.int64),
        kv_tokens=np.array([spec.kv_tokens(i) for i in range(len(spec.types))], np.int64),
        typical_batch=np.array([min(t.typical_batch, t.num_slots) for t in spec.types], np.int64),
        prefill_s_per_token=np.array([_slopes(t)[0] for t in spec.types]),
        step_s_per_seq=np.array([_slopes(t)[1] for t in spec.types]),
        step_s_per_kv_token=np.array([_slopes(t)[2] for t in spec.types]),
        move_delay_s=float(spec.move_delay_s),
        move_on=moves[spec.move_on] if spec.move_delay_s > 0 else MOVE_NEVER,
    )


def _slopes(kind: DeviceType) -> tuple[float, float, float]:
    """Seconds of a prefill token, of one more decode in a step, and of one more token it sees."""
    if kind.engine is None:
        return 0.0, 0.0, 0.0
    grid, budget = kind.engine.grid, kind.engine.max_num_batched_tokens
    few, many = 16 * 1024, 16 * 4096
    one, batch = grid.step_s([], 1, few), grid.step_s([], 16, few)
    longer = grid.step_s([], 16, many)
    return (
        grid.step_s([(budget, 0)]) / budget,
        max(0.0, batch - one) / 15,
        max(0.0, longer - batch) / (many - few),
    )


def _no_engine() -> ReplicaType:
    """Stand in for the engine types of a fleet that has none."""

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape)

    grid = CostGrid(
        cpu_s=1.0,
        dense_tokens=np.arange(NUM_DENSE_KNOTS, dtype=float),
        dense_s=zeros(NUM_DENSE_KNOTS),
        prefill_chunk=np.arange(NUM_CHUNK_KNOTS, dtype=float),
        prefill_context=np.arange(NUM_CONTEXT_KNOTS, dtype=float),
        prefill_s=zeros(NUM_CHUNK_KNOTS, NUM_CONTEXT_KNOTS),
        decode_batch=np.arange(NUM_BATCH_KNOTS, dtype=float),
        decode_kv=np.arange(NUM_KV_KNOTS, dtype=float),
        decode_s=zeros(NUM_BATCH_KNOTS, NUM_KV_KNOTS),
    )
    return ReplicaType("none", grid, num_blocks=1)


def make_state(spec: FleetSpec, capacity: Capacity) -> State:
    """Make the arrays, all zero; every environment must be filled before use."""
    e, n, j, m, d, f = capacity
    types = len(spec.types)
    slots = max(t.num_slots for t in spec.types)
    return State(
        stage=np.zeros((e, n), STAGE_DTYPE),
        truth=np.zeros((e, n), TRUTH_DTYPE),
        expected_s=np.zeros((e, n, types)),
        job=np.zeros((e, j), JOB_DTYPE),
        device=np.zeros((e, d), DEVICE_DTYPE),
        env=np.zeros(e, ENV_DTYPE),
        edge=np.zeros((e, m), EDGE_DTYPE),
        pred=np.zeros((e, m), np.int64),
        latency_s=np.zeros((e, d, d)),
        s_per_byte=np.zeros((e, d, d)),
        ready=np.zeros((e, n), np.int64),
        fresh=np.zeros((e, n), np.int64),
        ready_on=np.zeros((e, types), np.int64),
        running=np.zeros((e, d, slots), np.int64),
        running_due_s=np.zeros((e, d, slots)),
        queue=np.zeros((e, d, slots), np.int64),
        ends=np.zeros((e, d, slots), ENTRY_DTYPE),
        fetches=np.zeros((e, d, slots), ENTRY_DTYPE),
        tools=np.zeros((e, n), ENTRY_DTYPE),
        fault=np.zeros((e, f), FAULT_DTYPE),
    )


def load_episode(params: Params, pool: Pool, state: State, env: int, episode: Episode) -> None:
    """Write an episode into one environment and put that into its initial state."""
    d, f, j = episode.num_devices, len(episode.faults), episode.num_jobs
    device = state.device[env, :d]
    device["type_idx"] = episode.type_idx
    device["base_speed"] = episode.speed
    for name in ("latency_s", "s_per_byte"):
        values = 0.0 if episode.links is None else getattr(episode.links, name)
        getattr(state, name)[env, :d, :d] = values
    for column in ("time_s", "replica", "kind", "value"):
        state.fault[column][env, :f] = getattr(episode.faults, column)
    state.job["arrival_s"][env, :j] = episode.arrival_s
    constants = state.env[env]
    constants["num_jobs"] = j
    constants["num_devices"] = d
    constants["num_faults"] = f
    constants["noise_seed"] = np.uint64(episode.noise_seed)
    constants["noise_sigma"] = episode.noise_sigma
    constants["deadline_scale"] = episode.deadline_scale
    load_jobs(params, pool, state, env, np.ascontiguousarray(episode.order, np.int64))
