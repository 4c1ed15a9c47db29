"""Batch mode: look at all ready tasks, place the one that the rule prefers, look again."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Graph, Workflow
from servegym.workflow.placement import arrival_s
from servegym.workflow.schedule import Schedule


class Preference(IntEnum):
    """Which of the ready tasks is placed next; the lower task of equals."""

    LEAST_COMPLETION = 0
    MOST_COMPLETION = 1
    MOST_SUFFERAGE = 2
    EARLIEST_START = 3


_MOST = int(Preference.MOST_COMPLETION)
_SUFFERAGE = int(Preference.MOST_SUFFERAGE)
_START = int(Preference.EARLIEST_START)


def place_in_batches(workflow: Workflow, preference: Preference) -> Schedule:
    """Place each task after the last one of its device, the preferred ready task first.

    A task is ready when its parents are placed. Its device is the one with the earliest completion
    (with `EARLIEST_START`: start), the lower device of equals. One step looks at every ready task:
    O(num_tasks * (ready tasks) * num_devices) at worst.
    """
    g = workflow.graph
    num_tasks, num_devices = workflow.num_tasks, workflow.num_devices
    device = np.zeros(num_tasks, np.int64)
    start_s, finish_s = np.zeros(num_tasks), np.zeros(num_tasks)
    place_batches(
        g,
        int(preference),
        np.diff(g.pred_start),
        np.zeros(num_tasks, np.int64),
        np.zeros((num_tasks, num_devices)),
        np.zeros(num_devices),
        np.zeros((num_tasks, 2)),
        np.zeros((num_tasks, 2), np.int64),
        device,
        start_s,
        finish_s,
    )
    return Schedule(workflow, device, start_s, finish_s)


@kernel
def place_batches(
    g: Graph,
    preference: int,
    parents_left: IntArray,
    ready: IntArray,
    ready_s: FloatArray,
    avail_s: FloatArray,
    cost_s: FloatArray,
    choice: IntArray,
    device: IntArray,
    start_s: FloatArray,
    finish_s: FloatArray,
) -> None:
    """Fill `device`, `start_s` and `finish_s`.

    `cost_s` and `choice` keep the best and second-best device of each ready task. They are found
    anew when the device has just got a task; only Sufferage needs the second to be up to date.
    """
    num_tasks, num_devices = g.duration_s.shape
    num_ready = 0
    for v in range(num_tasks):
        if parents_left[v] == 0:
            ready[num_ready] = v
            num_ready += 1
            rank_devices(g, preference, v, ready_s, avail_s, cost_s, choice)
    while num_ready > 0:
        best, best_key = 0, 0.0
        for i in range(num_ready):
            v = ready[i]
            if preference == _SUFFERAGE:
                key = cost_s[v, 0] - cost_s[v, 1]
            elif preference == _MOST:
                key = -cost_s[v, 0]
            else:
                key = cost_s[v, 0]
            if i == 0 or key < best_key or (key == best_key and v < ready[best]):
                best, best_key = i, key
        v = ready[best]
        num_ready -= 1
        ready[best] = ready[num_ready]
        p = choice[v, 0]
        device[v] = p
        start_s[v] = max(avail_s[p], ready_s[v, p])
        finish_s[v] = start_s[v] + g.duration_s[v, p]
        avail_s[p] = finish_s[v]
        for i in range(num_ready):
            u = ready[i]
            if choice[u, 0] == p or (preference == _SUFFERAGE and choice[u, 1] == p):
                rank_devices(g, preference, u, ready_s, avail_s, cost_s, choice)
        for e in range(g.succ_start[v], g.succ_start[v + 1]):
            w = g.child[e]
            parents_left[w] -= 1
            if parents_left[w] == 0:
                ready[num_ready] = w
                num_ready += 1
                for q in range(num_devices):
                    ready_s[w, q] = arrival_s(g, w, q, device, finish_s)
                rank_devices(g, preference, w, ready_s, avail_s, cost_s, choice)


@inlined
def rank_devices(
    g: Graph,
    preference: int,
    v: int,
    ready_s: FloatArray,
    avail_s: FloatArray,
    cost_s: FloatArray,
    choice: IntArray,
) -> None:
    """Find the best and the second-best device of a task."""
    best, second = -1, -1
    best_s, second_s = math.inf, math.inf
    for p in range(g.duration_s.shape[1]):
        work_s = g.duration_s[v, p]
        if work_s == math.inf:
            continue
        here_s = max(avail_s[p], ready_s[v, p])
        if preference != _START:
            here_s += work_s
        if best < 0 or here_s < best_s:
            second, second_s = best, best_s
            best, best_s = p, here_s
        elif second < 0 or here_s < second_s:
            second, second_s = p, here_s
    choice[v, 0], choice[v, 1] = best, second
    cost_s[v, 0], cost_s[v, 1] = best_s, second_s
