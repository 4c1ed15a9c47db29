"""Earliest task first: the start that can be soonest."""

from __future__ import annotations

from servegym.baselines.workflow.online.choice import action_of, begin_s
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.policy import Rule, rule
from servegym.workflow.online.state import WAIT
from servegym.workflow.online.view import View, can_start


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
    best, best_s = WAIT, 0.0
    now_s = w.env[0].now_s
    for i in range(w.env[0].num_ready):
        for d in range(w.env[0].num_devices):
            if can_start(w, w.ready[i], d):
                this_s = begin_s(w, w.ready[i], d, now_s)
                if best == WAIT or this_s < best_s:
                    best, best_s = action_of(w, w.ready[i], d), this_s
    return best


def etf() -> Rule:
    """The stage and device that can begin first; the longest way to the end breaks ties."""
    return Rule(name="etf", information="predictive", decide=decide, reference="Hwang et al. 1989")
