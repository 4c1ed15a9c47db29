"""HEFT at run time: ready stages by upward rank, each where it is expected to end first."""

from __future__ import annotations

import math

from servegym.baselines.workflow.online.choice import action_of, begin_s
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.policy import Rule, rule
from servegym.workflow.online.state import WAIT
from servegym.workflow.online.view import View, can_run, can_start, duration_s, free_s


@rule
def decide(
    w: View,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `workflow.online.policy.rule`."""
    num_devices = w.env[0].num_devices
    for d in range(num_devices):
        device_memory[d, 0] = free_s(w, d)
        device_memory[d, 1] = w.device[d].slots - w.device[d].num_running
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        best, best_s = -1, math.inf
        for d in range(num_devices):
            if can_run(w, v, d):
                finish_s = begin_s(w, v, d, device_memory[d, 0]) + duration_s(w, v, d)
                if finish_s < best_s:
                    best, best_s = d, finish_s
        if best < 0:
            continue
        if device_memory[best, 1] > 0.0 and can_start(w, v, best):
            return action_of(w, v, best)
        # it would wait there: a device of n slots that are taken frees one n times as often
        device_memory[best, 1] = 0.0
        device_memory[best, 0] += (best_s - device_memory[best, 0]) / w.device[best].slots
    return WAIT


def heft_rt() -> Rule:
    """Ready stages by upward rank, each on the device where it ends first, if need be after others.

    Ranks are those of each job alone. A stage whose best device is busy is left for it: the walk
    down the list books its time there, and only a stage whose best device is free starts.
    """
    return Rule(
        name="heft-rt",
        information="predictive",
        decide=decide,
        device_columns=2,
        reference="HEFT_RT of DeepSoCS (Sung et al. 2020) and SoCRATES",
    )
