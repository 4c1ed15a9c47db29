"""Orders by due date: EDD, MDD, ATC and least slack."""

from __future__ import annotations

import math

import numpy as np

from servegym.baselines.workflow.online.choice import action_of, earliest_finish
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.policy import Rule, rule
from servegym.workflow.online.state import WAIT
from servegym.workflow.online.view import View

_EDD, _MDD, _ATC, _SLACK = range(4)


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
    now_s, count = w.env[0].now_s, w.env[0].num_ready
    order = int(params[0])
    mean_s = 0.0
    for i in range(count):
        mean_s += w.stage[w.ready[i]].rank_s / count
    best, device, least = -1, -1, 0.0
    for i in range(count):
        v = w.ready[i]
        job = w.job[w.stage[v].job]
        left_s = w.stage[v].rank_s
        due_s = job.arrival_s + job.deadline_s
        if order == _EDD:
            key = due_s
        elif order == _MDD:
            key = max(due_s, now_s + left_s)
        elif order == _ATC:
            slack_s = max(0.0, due_s - left_s - now_s)
            urgency = math.exp(-slack_s / (params[1] * max(mean_s, 1e-12)))
            key = -job.weight / max(left_s, 1e-12) * urgency
        else:
            key = due_s - now_s - left_s
            if params[1] > 0.0 and due_s < now_s + w.stage[v].tail_s:
                key += 1e15  # too late on the fastest devices: behind all that can be in time
        if best >= 0 and key >= least:
            continue
        d = earliest_finish(w, v)
        if d >= 0:
            best, device, least = v, d, key
    return WAIT if best < 0 else action_of(w, best, device)


def _rule(name: str, order: int, reference: str, second: float = 0.0, names: str = "") -> Rule:
    return Rule(
        name=name,
        information="predictive",
        decide=decide,
        params=np.array([order, second]),
        param_names=("", names) if names else (),
        reference=reference,
    )


def edd() -> Rule:
    """The job that is due first."""
    return _rule("edd", _EDD, "earliest due date (Jackson 1955)")


def mdd() -> Rule:
    """The job with the least of due date and earliest possible end, the later of the two."""
    return _rule("mdd", _MDD, "modified due date (Baker, Bertrand 1982)")


def atc(k: float = 2.0) -> Rule:
    """Weight over time left, less the more slack there is: apparent tardiness cost."""
    return _rule("atc", _ATC, "Vepsalainen, Morton 1987", k, "k")


def least_slack(hopeless_last: float = 0.0) -> Rule:
    """The job with the least time to spare; with `hopeless_last`, late ones come last."""
    return _rule("least-slack", _SLACK, "least slack time first", hopeless_last, "hopeless_last")
