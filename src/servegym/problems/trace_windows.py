"""What must be known of the windows that seeds choose from a trace."""

from __future__ import annotations

from collections.abc import Sequence

from servegym.scenario import Scenario
from servegym.workloads.config import TraceConfig


def cut_off_notes(
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
