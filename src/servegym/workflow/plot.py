"""Gantt charts of schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from servegym.typing import IntArray
from servegym.workflow.schedule import Schedule

#: Share of the axis that a letter of a bar's name takes; longer names would not fit.
_LETTER_SHARE = 0.005


def draw_gantt(
    axis: Any,
    schedule: Schedule,
    palette: Sequence[str],
    span_s: float,
    group: IntArray | None = None,
) -> None:
    """Draw one row a device, one bar a task, into a matplotlib axis.

    Args:
        axis: Where to draw.
        schedule: What to draw.
        palette: Colours, taken in turn by the tasks of a device.
        span_s: Length of the time axis, so that charts below each other compare.
        group: Tasks with the same number have the same colour instead, `int64[num_tasks]`.
    """
    flow = schedule.workflow
    number = group
    if number is None:
        number = np.zeros(flow.num_tasks, np.int64)
        order = np.argsort(schedule.start_s, kind="stable")
        for p in range(flow.num_devices):
            here = order[schedule.device_idx[order] == p]
            number[here] = np.arange(len(here))
    axis.barh(
        schedule.device_idx,
        schedule.finish_s - schedule.start_s,
        left=schedule.start_s,
        height=0.8,
        color=[palette[i % len(palette)] for i in number],
        edgecolor="white",
        linewidth=0.5,
    )
    letters = np.array([len(task) for task in flow.tasks])
    wide = schedule.finish_s - schedule.start_s > _LETTER_SHARE * span_s * letters
    for v in np.flatnonzero(wide):
        middle_s = (schedule.start_s[v] + schedule.finish_s[v]) / 2
        axis.text(
            middle_s,
            schedule.device_idx[v],
            flow.tasks[v],
            ha="center",
            va="center",
            fontsize=7,
            color="white",
            clip_on=True,
        )
    axis.set(
        xlim=(0, span_s),
        ylim=(flow.num_devices - 0.5, -0.5),  # the first device on top
        yticks=range(flow.num_devices),
        yticklabels=flow.devices,
    )
    axis.grid(visible=False)
