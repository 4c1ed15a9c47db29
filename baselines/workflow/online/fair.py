"""Fair shares of the devices: equal, or by a power of a job's total work."""

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
    best, device, least = -1, -1, 0.0
    for i in range(w.env[0].num_ready):
        v = w.ready[i]
        job = w.job[w.stage[v].job]
        share = max(job.work_s, 1e-9) ** params[0]
        # how full its share would be with this stage
        filled = (job.num_running + 1.0) / share
        if best >= 0 and (
            filled > least or (filled == least and w.stage[v].job >= w.stage[best].job)
        ):
            continue
        d = earliest_finish(w, v)
        if d >= 0:
            best, device, least = v, d, filled
    return WAIT if best < 0 else action_of(w, best, device)


def fair() -> Rule:
    """The job with the fewest stages on devices: all jobs have the same share."""
    return Rule(
        name="fair",
        information="predictive",
        decide=decide,
        params=np.zeros(1),
        reference="Decima's comparison set (Mao et al. 2019)",
    )


def weighted_fair(alpha: float = -1.0) -> Rule:
    """The job that is furthest below its share, which grows as its total work to the `alpha`."""
    return Rule(
        name="weighted-fair",
        information="predictive",
        decide=decide,
        params=np.array([alpha]),
        param_names=("alpha",),
        reference="Decima's tuned weighted fair (Mao et al. 2019); alpha 1 is the naive one",
    )
