"""Shaped rewards for jobs: each decision is charged what it adds to the time jobs still need.

The counterpart of `envs.shaping` for `servegym/Workflow-v0`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.envs.shaping import Memory, Potentials, chance_below, memory, sort_by_left
from servegym.envs.workflow_kernels import DEADLINE, MAKESPAN, least_makespan_s
from servegym.typing import BoolArray, FloatArray, IntArray
from servegym.workflow.online.state import Params, State
from servegym.workflow.online.view import View, view


@inlined
def _note_started(w: View, m: Memory, place: IntArray, stage: int) -> None:
    """Book what a stage that has been started has done, and how long its job takes at least."""
    q = w.stage[stage]
    now_s = w.env[0].now_s
    k = place[q.job]
    m.wait_s[k] = max(m.wait_s[k], max(0.0, q.due_s - now_s) + q.tail_s - q.least_s)
    length_s = q.due_s - q.begin_s
    if length_s > 0.0 and now_s > q.begin_s:
        m.left[k] -= q.work_s * min(1.0, (now_s - q.begin_s) / length_s)


@kernel
def job_potential(p: Params, s: State, e: int, objective: int, m: Memory, place: IntArray) -> float:
    """Estimate what the jobs in the system will still earn, if no others arrive.

    A job needs its longest way on the fastest devices at least. Those with less work left go first
    and all devices share the work.
    """
    w = view(p, s, e)
    env = s.env[e]
    count = 0
    for j in range(env.next_job):
        if s.job[e, j].finish_s == s.job[e, j].finish_s:
            continue  # it has ended
        place[j] = count
        m.left[count] = s.job[e, j].work_left_s
        m.wait_s[count] = 0.0
        m.who[count] = j
        count += 1
    if count == 0:
        return 0.0
    for i in range(env.num_ready):
        q = w.stage[w.ready[i]]
        m.wait_s[place[q.job]] = max(m.wait_s[place[q.job]], q.tail_s)
    num_up = 0
    for d in range(env.num_devices):
        num_up += w.device[d].up
        for i in range(w.device[d].num_running):
            _note_started(w, m, place, w.running[d, i])
    for i in range(env.num_tools):
        _note_started(w, m, place, s.tools[e, i].stage)
    sort_by_left(m, count)
    total, ahead_s = 0.0, 0.0
    for i in range(count):
        ahead_s += max(0.0, m.left[i]) / max(1, num_up)
        end_s = max(m.wait_s[i], ahead_s)
        job = s.job[e, m.who[i]]
        if objective == DEADLINE:
            total += job.weight * chance_below(env.now_s + end_s - job.arrival_s, job.deadline_s)
        elif objective != MAKESPAN:
            total -= job.weight * end_s
    if objective == MAKESPAN:  # the reward itself counts the longest ways
        total = min(0.0, least_makespan_s(w, s, e) - (env.now_s + ahead_s))
    return total


@kernel
def shape_jobs(
    p: Params,
    s: State,
    objective: int,
    m: Memory,
    place: IntArray,
    first: int,
    stop: int,
    active: BoolArray,
    ended: BoolArray,
    scale: float,
    value: FloatArray,
    reward: FloatArray,
) -> None:
    """Add the change of the potential to the rewards of `first..stop-1`, where active."""
    for e in range(first, stop):
        if active[e]:
            new = 0.0 if ended[e] else job_potential(p, s, e, objective, m, place)
            reward[e] += (new - value[e]) / scale
            value[e] = new


class JobsToGo(Potentials):
    """Potentials of a batch of environments of jobs; see `Potentials`.

    Args:
        num_envs: Environments.
        objective: `JCT`, `MAKESPAN` or `DEADLINE` of `envs.workflow_kernels`.
        scale: Divides rewards.
    """

    def __init__(self, num_envs: int, *, objective: int, scale: float) -> None:
        super().__init__(num_envs, scale=scale)
        self._objective = objective

    def _of(self, p: Params, s: State, env: int) -> float:
        return float(job_potential(p, s, env, self._objective, *_memory(s)))

    def _shape(self, p: Params, s: State, *step: Any) -> None:
        m, place = _memory(s)
        shape_jobs(p, s, self._objective, m, place, *step)


def _memory(s: State) -> tuple[Memory, IntArray]:
    """Make working memory for one thread."""
    most = s.job.shape[1]
    return memory(most), np.empty(most, np.int64)
