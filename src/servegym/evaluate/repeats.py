"""Seeds and loads that play the same episode again: they are no repeats, and give no interval."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from servegym.cluster.spec import Episode, Faults
from servegym.scenario import Scenario
from servegym.workflow.online.spec import Episode as JobEpisode
from servegym.workloads.config import TraceConfig

_E = TypeVar("_E")
_FAULTS = ("time_s", "replica", "kind", "value")


class Plan(NamedTuple):
    """What is played of the seeds and loads asked for.

    Attributes:
        seeds: Those whose episodes differ.
        loads: Likewise.
        notes: What was left out and why, in sentences.
    """

    seeds: list[int]
    loads: list[float]
    notes: list[str]


def requests_key(episode: Episode) -> bytes:
    """Name what a stream of requests asks of a cluster.

    How their lengths are foreseen and which SLO class they were drawn is no part of it: other
    draws of these are no other traffic.
    """
    table = episode.table
    return _digest(
        table.arrival_s,
        table.prompt_tokens,
        table.output_tokens,
        table.after,
        table.delay_s,
        table.prefix_offsets,
        table.prefix_keys,
        table.prefix_ends,
    )


def episode_key(episode: Episode, *, noisy: bool) -> bytes:
    """Name an episode: its requests, fleet and faults, and its noise if there is any."""
    return requests_key(episode) + _digest(
        episode.type_idx,
        episode.speed,
        *_faults(episode.faults),
        episode.noise_seed if noisy else 0,
    )


def jobs_key(episode: JobEpisode) -> bytes:
    """Name an episode of jobs: what they are and when they come, fleet, faults and noise."""
    jobs = episode.jobs
    return _digest(
        episode.arrival_s,
        episode.type_idx,
        episode.speed,
        *_faults(episode.faults),
        episode.noise_seed if episode.noise_sigma else 0,
        () if episode.job_idx is None else episode.job_idx,
        *(
            column
            for job in jobs
            for column in (
                job.kind,
                job.duration_s,
                job.tool_s,
                job.prompt_tokens,
                job.output_tokens,
                job.parent,
                job.child,
                job.data_bytes,
                job.shared_tokens,
                job.hidden,
                job.deadline_s,
                job.weight,
            )
        ),
    )


def plan(
    draw: Callable[[int, float], _E],
    key: Callable[[_E], bytes],
    seeds: Sequence[int],
    loads: Sequence[float],
) -> Plan:
    """Leave out the seeds and loads that play an episode again.

    Args:
        draw: Makes the episode of a seed and a load.
        key: Names it.
        seeds: As asked for.
        loads: As asked for; where they make no difference, load 1 stays if it is among them.
    """
    notes = []
    at = 1.0 if 1.0 in loads else loads[0]
    by_seed = [key(draw(seed, at)) for seed in seeds]
    kept = [seed for i, seed in enumerate(seeds) if by_seed[i] not in by_seed[:i]]
    if len(kept) < len(seeds):
        each = "it is played once, and there is no interval"
        if len(kept) > 1:
            each = "each is played once"
        what = "one episode" if len(kept) == 1 else f"{len(kept)} different episodes"
        notes.append(f"the {len(seeds)} seeds make {what}: {each}")
    played = list(loads)
    if len(loads) > 1 and all(key(draw(seeds[0], load)) == by_seed[0] for load in loads):
        played = [at]
        notes.append(
            f"the {len(loads)} loads make the same episodes, as none changes an arrival:"
            f" load {at:g} stands for them"
        )
    return Plan(kept, played, notes)


def plan_requests(
    scenario: Scenario, seeds: Sequence[int], loads: Sequence[float], num_requests: int | None
) -> Plan:
    """Leave out the seeds and loads that play the same requests on the same fleet again."""
    noisy = scenario.disturbances.step_noise_sigma > 0
    found = plan(
        lambda seed, load: scenario.episode(seed, load=load, num_requests=num_requests),
        lambda episode: episode_key(episode, noisy=noisy),
        seeds,
        loads,
    )
    notes = window_notes(scenario, len(found.seeds), num_requests)
    notes += _cut_off_notes(scenario, found.seeds, found.loads, num_requests)
    return found._replace(notes=[*found.notes, *notes])


def _cut_off_notes(
    scenario: Scenario, seeds: Sequence[int], loads: Sequence[float], num_requests: int | None
) -> list[str]:
    """Say how many requests wait for one that the window of a trace does not hold."""
    workload = scenario.played_workload
    if not isinstance(workload, TraceConfig):
        return []
    num = num_requests or scenario.num_requests
    counts = [
        workload.num_cut_off(scenario.request_rng(seed), num_requests=num, load=load)
        for seed in seeds
        for load in loads
    ]
    if not any(counts):
        return []
    mean = sum(counts) / len(counts)
    return [
        f"{mean:,.4g} requests of a window, on average, wait for one before it: these come by"
        " themselves, at their times in the trace, or as if answers took no time where it has none"
    ]


def window_notes(scenario: Scenario, num_seeds: int, num_requests: int | None) -> list[str]:
    """Say how far the windows of a trace are repeats of each other."""
    workload = scenario.played_workload
    if not isinstance(workload, TraceConfig):
        return []
    trace = workload.read()
    if trace.sessions is not None:
        return []  # drawn with replacement, as the trace says of itself
    there, each = len(trace.table), num_requests or scenario.num_requests
    if there <= each:
        notes = [
            f"{trace.name} has {there:,} requests, and an episode takes up to {each:,}: every seed"
            " plays all of them, training and tuning too; fewer --num-requests make windows"
        ]
        if num_seeds > 1:
            notes.append(
                "the seeds differ in fleet, faults or noise alone: the intervals say nothing about"
                " other traffic"
            )
        return notes
    if num_seeds > 1 and num_seeds * each > there:
        return [
            f"{num_seeds} windows of {each:,} requests overlap in the {there:,} of {trace.name}:"
            " they are no independent repeats, and the intervals are too narrow"
        ]
    return []


def _faults(faults: Faults) -> list[ArrayLike]:
    return [getattr(faults, name) for name in _FAULTS]


def _digest(*columns: ArrayLike) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for column in columns:
        values = np.ascontiguousarray(column)
        found.update(f"{values.dtype}{values.shape}".encode())
        found.update(values.tobytes())
    return found.digest()
