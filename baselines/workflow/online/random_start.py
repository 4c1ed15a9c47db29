"""A random start: the floor of every comparison."""

from __future__ import annotations

from servegym.baselines.workflow.online.choice import action_of
from servegym.cluster.rng import next_uniform
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
    count, chosen = 0, WAIT
    for i in range(w.env[0].num_ready):
        for d in range(w.env[0].num_devices):
            if can_start(w, w.ready[i], d):
                count += 1
                if next_uniform(rng) * count < 1.0:  # each of those seen so far is as likely
                    chosen = action_of(w, w.ready[i], d)
    return chosen


def random_start() -> Rule:
    """Any ready stage on any free device that can run it."""
    return Rule(name="random", information="blind", decide=decide, reference="floor")
