"""Shortest job first, its critical path first."""

from __future__ import annotations

import numpy as np

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
    best, device, least_s = -1, -1, 0.0
    for i in range(w.env[0].num_ready):  # by falling rank: the critical path of a job comes first
        v = w.ready[i]
        job = w.job[w.stage[v].job]
        work_s = job.work_left_s if params[0] > 0.0 else job.work_s
        if best >= 0 and work_s >= least_s:
            continue
        d = earliest_finish(w, v)
        if d >= 0:
            best, device, least_s = v, d, work_s
    return WAIT if best < 0 else action_of(w, best, device)


def _sjf_cp(name: str, left: float, reference: str) -> Rule:
    return Rule(
        name=name,
        information="predictive",
        decide=decide,
        params=np.array([left]),
        reference=reference,
    )


def sjf_cp() -> Rule:
    """The job with the least total work, its stage with the longest way to the end first."""
    return _sjf_cp("sjf-cp", 0.0, "Decima's comparison set (Mao et al. 2019)")


def srpt_cp() -> Rule:
    """The job with the least work left, its stage with the longest way to the end first."""
    return _sjf_cp("srpt-cp", 1.0, "as SJF-CP, by what is left of the work")
