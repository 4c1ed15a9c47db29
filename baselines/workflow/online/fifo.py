"""First in, first out: the job that arrived first, its stage that became ready first."""

from __future__ import annotations

from servegym.baselines.workflow.online.choice import action_of, earliest_finish
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.policy import Rule, rule
from servegym.workflow.online.state import WAIT
from servegym.workflow.online.view import View


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
    best, device = -1, -1
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        if best >= 0:
            a, b = w.stage[v], w.stage[best]
            if a.job > b.job:
                continue
            if a.job == b.job and (a.ready_s > b.ready_s or (a.ready_s == b.ready_s and v > best)):
                continue
        d = earliest_finish(w, v)
        if d >= 0:
            best, device = v, d
    return WAIT if best < 0 else action_of(w, best, device)


def fifo() -> Rule:
    """The job that arrived first, on the free device that is expected to end the stage first."""
    return Rule(
        name="fifo", information="predictive", decide=decide, reference="first in, first out"
    )
