"""HEFT over the unfinished stages of all jobs, planned anew when jobs arrive."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from servegym.baselines.workflow.online.choice import action_of
from servegym.cluster.jit import inlined, kernel
from servegym.typing import FloatArray, IntArray
from servegym.workflow.online.policy import Information
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import ENDED, NOWHERE, READY, STARTED, TOOL, WAIT
from servegym.workflow.online.view import View, can_run, can_start, is_visible, move_s
from servegym.workflow.placement import drop_first, fill_gap, first_gap, push


@dataclass
class HeftReplan:
    """Plan, then follow the plan: each lane of a device starts its stages in the planned order.

    A plan is made of all visible stages that have not started, those that run being frozen where
    they are, by HEFT with insertion on expected durations; upward ranks are those of each job
    alone, as a common entry and exit of no duration change none of them. An engine has as many
    lanes as sequences in its typical batch. It is made when a job arrives, a hidden stage shows, a
    device fails or recovers; with `eager` at every decision.

    Attributes:
        name: Name in tables.
        eager: Whether to plan before every decision.
    """

    name: str = "heft-replan"
    eager: bool = False
    information: Information = "predictive"
    asks_when_ready: bool = False
    reference: str = "HEFT (Topcuoglu, Hariri, Wu 2002), merged jobs, planned anew"
    _plans: list[_Plan] = field(default_factory=list, repr=False)

    def reset(self, simulator: Simulator, seed: int) -> None:
        """Drop all plans; nothing is random."""
        slots = np.minimum(simulator.params.typical_batch, simulator.params.slots)
        self._plans = []
        for env in range(simulator.num_envs):
            w = simulator.view(env)
            lanes = slots[w.device["type_idx"][: int(w.env[0]["num_devices"])]]
            self._plans.append(_Plan(np.repeat(np.arange(len(lanes)), lanes), len(w.stage)))

    def act(self, simulator: Simulator, envs: IntArray) -> IntArray:
        """Follow the plans; make those that are out of date."""
        actions = np.empty(len(envs), np.int64)
        for row, env in enumerate(envs.tolist()):
            plan, w = self._plans[env], simulator.view(env)
            if self.eager or plan.is_stale(w):
                plan.make(w)
            actions[row] = next_planned(w, plan.lane_device, plan.lane, plan.start_s, plan.first)
        return actions


class _Plan:
    """Lane and start of every planned stage of one environment."""

    def __init__(self, lane_device: IntArray, num_stages: int) -> None:
        self.lane_device = lane_device
        self.lane = np.full(num_stages, NOWHERE)
        self.start_s, self.finish_s = np.zeros(num_stages), np.zeros(num_stages)
        self.first = np.zeros(len(lane_device), np.int64)
        self._jobs, self._up = 0, np.zeros(0, np.int64)

    def is_stale(self, w: View) -> bool:
        """Whether a job arrived, a device failed or recovered, or a ready stage has no place."""
        ready = w.ready[: int(w.env[0]["num_ready"])]
        return bool(
            self._jobs != w.env[0]["next_job"]
            or not np.array_equal(self._up, w.device["up"])
            or (self.lane[ready] == NOWHERE).any()
        )

    def make(self, w: View) -> None:
        """Plan all visible stages that have not started."""
        self._jobs, self._up = int(w.env[0]["next_job"]), w.device["up"].copy()
        last = w.job[max(0, self._jobs - 1)]
        known = int(last["first_stage"] + last["num_stages"]) if self._jobs else 0
        lanes = len(self.lane_device)
        make_plan(
            w,
            known,
            self.lane_device,
            w.stage["rank_s"].copy(),
            np.zeros(known, np.int64),
            np.zeros(known, np.int64),
            np.zeros((lanes, known + 1)),
            np.full((lanes, known + 1), math.inf),
            np.ones(lanes, np.int64),
            self.lane,
            self.start_s,
            self.finish_s,
        )


@kernel
def make_plan(
    w: View,
    known: int,
    lane_device: IntArray,
    rank_s: FloatArray,
    parents_left: IntArray,
    heap: IntArray,
    gap_begin_s: FloatArray,
    gap_end_s: FloatArray,
    num_gaps: IntArray,
    lane: IntArray,
    start_s: FloatArray,
    finish_s: FloatArray,
) -> None:
    """Fill lane, start and finish of the first `known` stages; a lane of -1 is no plan."""
    now_s, num_lanes = w.env[0].now_s, lane_device.shape[0]
    for k in range(num_lanes):
        gap_begin_s[k, 0] = now_s
    size = 0
    for v in range(known):
        q = w.stage[v]
        lane[v] = NOWHERE
        if q.status == ENDED:
            finish_s[v] = q.finish_s
        elif q.status == STARTED:
            finish_s[v] = max(now_s, q.due_s)
            if q.kind != TOOL:
                _take_lane(w, v, lane_device, gap_begin_s, finish_s[v])
        elif is_visible(w, v):
            for k in range(q.pred_first, q.pred_stop):
                # a stage behind one that is not known yet gets its place when that shows
                parents_left[v] += w.stage[w.edge[w.pred[k]].parent].status < STARTED
            if parents_left[v] == 0:
                size = push(heap, size, rank_s, v)
    while size > 0:
        v = heap[0]
        size = drop_first(heap, size, rank_s)
        _place(w, v, lane_device, gap_begin_s, gap_end_s, num_gaps, lane, start_s, finish_s)
        for i in range(w.stage[v].succ_first, w.stage[v].succ_stop):
            child = w.edge[i].child
            if is_visible(w, child):
                parents_left[child] -= 1
                if parents_left[child] == 0:
                    size = push(heap, size, rank_s, child)


@inlined
def _take_lane(
    w: View, v: int, lane_device: IntArray, gap_begin_s: FloatArray, until_s: float
) -> None:
    """Block the first idle lane of a running stage's device; the first to be idle if none is."""
    best = -1
    for k in range(lane_device.shape[0]):
        if lane_device[k] == w.stage[v].device:
            if best < 0 or gap_begin_s[k, 0] < gap_begin_s[best, 0]:
                best = k
    gap_begin_s[best, 0] = max(gap_begin_s[best, 0], until_s)


@inlined
def _place(
    w: View,
    v: int,
    lane_device: IntArray,
    gap_begin_s: FloatArray,
    gap_end_s: FloatArray,
    num_gaps: IntArray,
    lane: IntArray,
    start_s: FloatArray,
    finish_s: FloatArray,
) -> None:
    """Put a stage where it ends first, into a gap if one holds it."""
    q = w.stage[v]
    best, best_gap, best_start_s, best_finish_s = -1, 0, 0.0, math.inf
    for k in range(lane_device.shape[0]):
        d = lane_device[k]
        if q.kind == TOOL or not can_run(w, v, d):
            continue
        there_s = _planned_data_s(w, v, d, lane, lane_device, finish_s)
        own_s = w.expected_s[v, w.device[d].type_idx] / w.device[d].speed + move_s(w, v, d)
        gap = first_gap(gap_begin_s, gap_end_s, num_gaps[k] - 1, k, there_s, own_s)
        begin_s = max(gap_begin_s[k, gap], there_s)
        if begin_s + own_s < best_finish_s:
            best, best_gap, best_start_s, best_finish_s = k, gap, begin_s, begin_s + own_s
    if best >= 0:
        lane[v] = best
        start_s[v] = best_start_s
        finish_s[v] = best_finish_s
        num_gaps[best] = fill_gap(
            gap_begin_s,
            gap_end_s,
            num_gaps[best],
            best,
            best_gap,
            best_start_s,
            best_finish_s,
            0.0,
        )
        return
    # a call of a tool, or nothing that could run it is up: then only its duration counts
    latest_s = w.env[0].now_s
    for k in range(q.pred_first, q.pred_stop):
        latest_s = max(latest_s, finish_s[w.edge[w.pred[k]].parent])
    finish_s[v] = latest_s + q.mean_s


@inlined
def _planned_data_s(
    w: View, v: int, d: int, lane: IntArray, lane_device: IntArray, finish_s: FloatArray
) -> float:
    """When the data of all known parents is expected on device `d`."""
    latest_s = w.env[0].now_s
    for k in range(w.stage[v].pred_first, w.stage[v].pred_stop):
        i = w.pred[k]
        u = w.edge[i].parent
        at = w.stage[u].device
        if lane[u] != NOWHERE:
            at = lane_device[lane[u]]
        there_s = finish_s[u]
        if w.edge[i].data_bytes > 0.0 and at != NOWHERE and at != d:
            there_s += w.latency_s[at, d] + w.edge[i].data_bytes * w.s_per_byte[at, d]
        latest_s = max(latest_s, there_s)
    return latest_s


@kernel
def next_planned(
    w: View, lane_device: IntArray, lane: IntArray, start_s: FloatArray, first: IntArray
) -> int:
    """Start the ready stage whose turn it is on a lane that can take it, the earliest first."""
    num_lanes = lane_device.shape[0]
    for k in range(num_lanes):
        first[k] = -1
    for j in range(w.env[0].next_job):
        job = w.job[j]
        if job.finish_s == job.finish_s:
            continue  # it has ended
        for v in range(job.first_stage, job.first_stage + job.num_stages):
            k = lane[v]
            if k != NOWHERE and w.stage[v].status < STARTED:
                if first[k] < 0 or start_s[v] < start_s[first[k]]:
                    first[k] = v
    best, best_lane = -1, -1
    for k in range(num_lanes):
        v = first[k]
        if v >= 0 and w.stage[v].status == READY and can_start(w, v, lane_device[k]):
            if best < 0 or start_s[v] < start_s[best]:
                best, best_lane = v, k
    return WAIT if best < 0 else action_of(w, best, lane_device[best_lane])


def heft_replan(eager: float = 0.0) -> HeftReplan:
    """HEFT over all unfinished stages, planned anew for each arrival, or with `eager` always."""
    return HeftReplan(eager=eager > 0.0)
