"""Choosing a device for a stage: the part that most rules share."""

from __future__ import annotations

import math

from servegym.cluster.jit import inlined
from servegym.workflow.online.view import (
    View,
    can_start,
    data_there_s,
    duration_s,
    move_s,
)


@inlined
def action_of(w: View, stage: int, d: int) -> int:
    """Action that starts a stage on a device."""
    return stage * w.env[0].num_devices + d


@inlined
def begin_s(w: View, stage: int, d: int, from_s: float) -> float:
    """When a stage begins on a device that is given to it at `from_s`, seconds."""
    return max(from_s + move_s(w, stage, d), data_there_s(w, stage, d))


@inlined
def earliest_finish(w: View, stage: int) -> int:
    """Device on which a ready stage, started now, is expected to end first.

    Returns:
        The device, the first of equals; -1 if it can start on none.
    """
    best, best_s = -1, math.inf
    for d in range(w.env[0].num_devices):
        if can_start(w, stage, d):
            finish_s = begin_s(w, stage, d, w.env[0].now_s) + duration_s(w, stage, d)
            if best < 0 or finish_s < best_s:
                best, best_s = d, finish_s
    return best
