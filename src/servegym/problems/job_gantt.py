"""A stretch of an episode of jobs as a schedule, for Gantt charts."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from servegym.drawing import PALETTE, pyplot
from servegym.problems.problem import Comparison
from servegym.typing import IntArray
from servegym.workflow.gantt_page import gantt_svg
from servegym.workflow.graph import make_workflow
from servegym.workflow.plot import draw_gantt
from servegym.workflow.schedule import Schedule

#: More bars make neither a page nor a picture clearer.
_MOST_BARS = 400
#: Colours, taken in turn by the jobs.
_COLOURS = PALETTE[:7]


@dataclass(frozen=True)
class JobTrail:
    """What plots need of one run.

    Attributes:
        jobs: `JOB_OUTCOME_DTYPE[num_jobs]`.
        stages: `STAGE_OUTCOME_DTYPE[num_stages]`.
        edge: Parent and child of each edge, numbers of stages, `int64[num_edges, 2]`.
        templates: Name of each job's template.
        devices: Name of each device's type.
    """

    jobs: NDArray[np.void]
    stages: NDArray[np.void]
    edge: IntArray
    templates: tuple[str, ...]
    devices: tuple[str, ...]


def charted_window(result: Comparison, load: float, names: list[str]) -> tuple[float, float]:
    """Return the stretch of time to show, the same for all policies: first second and length.

    It begins in the middle of the arrivals and is as long as none of the policies has more than
    `_MOST_BARS` stages on devices in it.
    """
    trails = [result.trails[name, load] for name in names]
    begin_s = float(np.median(trails[0].jobs["arrival_s"]))
    span_s = max(float(trail.jobs["finish_s"].max()) for trail in trails) - begin_s
    while max(_shown(trail, begin_s, span_s).sum() for trail in trails) > _MOST_BARS:
        span_s /= 1.25
    return begin_s, span_s


def _shown(trail: JobTrail, begin_s: float, span_s: float) -> np.ndarray:
    """Which stages are on a device within a stretch of time."""
    stages = trail.stages
    inside = (stages["finish_s"] > begin_s) & (stages["start_s"] < begin_s + span_s)
    return inside & (stages["device"] >= 0)


def charted_schedule(
    trail: JobTrail, step_name: Callable[[str, int], str], begin_s: float, span_s: float
) -> tuple[Schedule, IntArray]:
    """Cut a stretch out of an episode; each slot of a device that is used becomes a row.

    Args:
        trail: The episode.
        step_name: Name of a template's step by its label.
        begin_s: First second shown, from then on time counts from 0.
        span_s: Length of the stretch.

    Returns:
        Stages as tasks of a schedule, cut off at both ends, and the job of each.
    """
    rows = np.flatnonzero(_shown(trail, begin_s, span_s))
    stages = trail.stages[rows]
    start_s = np.maximum(stages["start_s"] - begin_s, 0.0)
    finish_s = np.minimum(stages["finish_s"] - begin_s, span_s)
    slot = np.zeros(len(rows), np.int64)
    used = np.zeros(len(trail.devices), np.int64)
    for d in range(len(trail.devices)):
        mine = np.flatnonzero(stages["device"] == d)
        slot[mine], used[d] = _slots(start_s[mine], finish_s[mine])
    used = np.maximum(used, 1)  # an idle device has a row too
    first_row = np.cumsum(used) - used
    device_idx = first_row[stages["device"]] + slot
    names = [
        f"{d} {kind}" if k == 0 else f"{d}.{k}"
        for d, kind in enumerate(trail.devices)
        for k in range(used[d])
    ]
    tasks = [
        f"{s['job']}.{s['stage']} {step_name(trail.templates[s['job']], int(s['label']))}"
        for s in stages
    ]
    duration_s = np.full((len(rows), len(names)), np.inf)
    duration_s[np.arange(len(rows)), device_idx] = finish_s - start_s
    place = np.full(len(trail.stages), -1)
    place[rows] = np.arange(len(rows))
    edges = place[trail.edge]
    flow = make_workflow(tasks, names, duration_s, edges[(edges >= 0).all(1)])
    return Schedule(flow, device_idx, start_s, finish_s), stages["job"].astype(np.int64)


def _slots(start_s: np.ndarray, finish_s: np.ndarray) -> tuple[IntArray, int]:
    """Give intervals the lowest number that is free when they start; also how many are needed."""
    slot = np.zeros(len(start_s), np.int64)
    free: list[int] = []
    running: list[tuple[float, int]] = []
    count = 0
    for i in np.argsort(start_s, kind="stable").tolist():
        while running and running[0][0] <= start_s[i]:
            heapq.heappush(free, heapq.heappop(running)[1])
        if not free:
            free.append(count)
            count += 1
        slot[i] = heapq.heappop(free)
        heapq.heappush(running, (float(finish_s[i]), int(slot[i])))
    return slot, count


def gantt_charts(result: Comparison, load: float, names: list[str]) -> dict[str, str]:
    """Draw a stretch of the first episode under each policy as SVG, jobs by colour."""
    begin_s, span_s = charted_window(result, load, names)
    charts = {}
    for name in names:
        schedule, job = _charted(result, name, load, begin_s, span_s)
        charts[name] = gantt_svg(schedule, _COLOURS, span_s, job)
    return charts


def draw_episodes(result: Comparison, load: float, names: list[str]) -> Any:
    """Draw the same as one figure, a policy below the other."""
    plt = pyplot()
    begin_s, span_s = charted_window(result, load, names)
    shown = [_charted(result, name, load, begin_s, span_s) for name in names]
    rows = [schedule.workflow.num_devices for schedule, _ in shown]
    figure, axes = plt.subplots(
        len(names),
        1,
        figsize=(14, 0.9 * len(names) + 0.2 * sum(rows)),
        height_ratios=rows,
        squeeze=False,
    )
    for axis, name, (schedule, job) in zip(axes[:, 0], names, shown, strict=True):
        draw_gantt(axis, schedule, _COLOURS, span_s, job)
        axis.set_title(name, loc="left", fontsize=10)
        axis.tick_params(axis="y", labelsize=7)
    axes[-1, 0].set_xlabel(f"s after {begin_s:.0f} s")
    figure.tight_layout()
    return figure


def _charted(
    result: Comparison, name: str, load: float, begin_s: float, span_s: float
) -> tuple[Schedule, IntArray]:
    step_name = result.scenario.workload.step_name
    return charted_schedule(result.trails[name, load], step_name, begin_s, span_s)
