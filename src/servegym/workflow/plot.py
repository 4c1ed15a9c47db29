"""Gantt charts of schedules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from servegym.workflow.schedule import Schedule

#: Bars narrower than this share of the axis get no name: it would not fit.
_NAMED_SHARE = 0.02


def draw_gantt(axis: Any, schedule: Schedule, palette: Sequence[str], span_s: float) -> None:
    """Draw one row a device, one bar a task, into a matplotlib axis.

    Args:
        axis: Where to draw.
        schedule: What to draw.
        palette: Colours, taken in turn by the tasks of a device.
        span_s: Length of the time axis, so that charts below each other compare.
    """
    flow = schedule.workflow
    order = np.argsort(schedule.start_s, kind="stable")
    turn = np.zeros(flow.num_tasks, int)
    for p in range(flow.num_devices):
        here = order[schedule.device_idx[order] == p]
        turn[here] = np.arange(len(here)) % len(palette)
    axis.barh(
        schedule.device_idx,
        schedule.finish_s - schedule.start_s,
        left=schedule.start_s,
        height=0.8,
        color=[palette[i] for i in turn],
        edgecolor="white",
        linewidth=0.5,
    )
    for v in np.flatnonzero(schedule.finish_s - schedule.start_s > _NAMED_SHARE * span_s):
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
    axis.set(xlim=(0, span_s), yticks=range(flow.num_devices), yticklabels=flow.devices)
    axis.grid(visible=False)
    axis.invert_yaxis()
