"""List scheduling: take ready tasks by priority and give each the device that suits it best."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Graph, Workflow, moving_s
from servegym.workflow.schedule import Schedule


class Choice(IntEnum):
    """What makes a device the best for a task; the lower device of equals."""

    EARLIEST_FINISH = 0
    SHORTEST_DURATION = 1
    FIRST_IDLE = 2


_SHORTEST = int(Choice.SHORTEST_DURATION)
_IDLE = int(Choice.FIRST_IDLE)
FIXED_NOWHERE = -1


def place_by_priority(
    workflow: Workflow,
    priority: FloatArray,
    *,
    choice: Choice = Choice.EARLIEST_FINISH,
    insertion: bool = True,
    ahead_s: FloatArray | None = None,
    fixed_device: IntArray | None = None,
) -> Schedule:
    """Place each task when its parents are placed, the highest priority first.

    Args:
        workflow: What to schedule.
        priority: `float64[num_tasks]`; the lower task of equals goes first.
        choice: How a device is chosen.
        insertion: Whether a task may go into a gap between two tasks placed before it.
        ahead_s: Added to each finish time in the choice, `float64[num_tasks, num_devices]`.
        fixed_device: `int64[num_tasks]`; -1 where the device is free to choose.

    Returns:
        A schedule with every task.
    """
    g = workflow.graph
    shape = workflow.num_tasks, workflow.num_devices
    if ahead_s is None:
        ahead_s = np.zeros(shape)
    if fixed_device is None:
        fixed_device = np.full(workflow.num_tasks, FIXED_NOWHERE)
    device = np.zeros(workflow.num_tasks, np.int64)
    start_s = np.zeros(workflow.num_tasks)
    finish_s = np.zeros(workflow.num_tasks)
    gap_begin_s = np.zeros((workflow.num_devices, workflow.num_tasks + 1))
    gap_end_s = np.full((workflow.num_devices, workflow.num_tasks + 1), math.inf)
    place_tasks(
        g,
        priority,
        int(choice),
        int(insertion),
        ahead_s,
        fixed_device,
        g.duration_s.min(0),
        np.diff(g.pred_start),
        np.zeros(workflow.num_tasks, np.int64),
        gap_begin_s,
        gap_end_s,
        np.ones(workflow.num_devices, np.int64),
        device,
        start_s,
        finish_s,
    )
    return Schedule(workflow, device, start_s, finish_s)


@kernel
def place_tasks(
    g: Graph,
    priority: FloatArray,
    choice: int,
    insertion: int,
    ahead_s: FloatArray,
    fixed_device: IntArray,
    shortest_s: FloatArray,
    parents_left: IntArray,
    heap: IntArray,
    gap_begin_s: FloatArray,
    gap_end_s: FloatArray,
    num_gaps: IntArray,
    device: IntArray,
    start_s: FloatArray,
    finish_s: FloatArray,
) -> None:
    """Fill `device`, `start_s` and `finish_s`.

    The idle time of each device is kept as sorted gaps, the last one without an end. Gaps shorter
    than the shortest task of the device (`shortest_s`) are dropped: nothing will ever fit.
    """
    num_tasks, num_devices = g.duration_s.shape
    size = 0
    for v in range(num_tasks):
        if parents_left[v] == 0:
            size = push(heap, size, priority, v)
    while size > 0:
        v = heap[0]
        size = drop_first(heap, size, priority)
        best, best_cost_s, best_start_s, best_gap = -1, math.inf, 0.0, 0
        for p in range(num_devices):
            work_s = g.duration_s[v, p]
            if work_s == math.inf or (fixed_device[v] >= 0 and fixed_device[v] != p):
                continue
            ready_s = arrival_s(g, v, p, device, finish_s)
            last = num_gaps[p] - 1
            gap = last
            if insertion != 0:
                gap = first_gap(gap_begin_s, gap_end_s, last, p, ready_s, work_s)
            begin_s = max(gap_begin_s[p, gap], ready_s)
            if choice == _SHORTEST:
                cost_s = work_s
            elif choice == _IDLE:
                cost_s = gap_begin_s[p, last]
            else:
                cost_s = begin_s + work_s + ahead_s[v, p]
            if best < 0 or cost_s < best_cost_s:
                best, best_cost_s, best_start_s, best_gap = p, cost_s, begin_s, gap
        device[v] = best
        start_s[v] = best_start_s
        finish_s[v] = best_start_s + g.duration_s[v, best]
        num_gaps[best] = fill_gap(
            gap_begin_s,
            gap_end_s,
            num_gaps[best],
            best,
            best_gap,
            best_start_s,
            finish_s[v],
            shortest_s[best],
        )
        for e in range(g.succ_start[v], g.succ_start[v + 1]):
            w = g.child[e]
            parents_left[w] -= 1
            if parents_left[w] == 0:
                size = push(heap, size, priority, w)


@inlined
def arrival_s(g: Graph, v: int, p: int, device: IntArray, finish_s: FloatArray) -> float:
    """When the data of all parents of `v` is on device `p`."""
    latest_s = 0.0
    for k in range(g.pred_start[v], g.pred_start[v + 1]):
        e = g.pred_edge[k]
        u = g.parent[e]
        latest_s = max(latest_s, finish_s[u] + moving_s(g, e, device[u], p))
    return latest_s


@inlined
def first_gap(
    gap_begin_s: FloatArray,
    gap_end_s: FloatArray,
    last: int,
    p: int,
    ready_s: float,
    work_s: float,
) -> int:
    """Find the first gap of device `p` that holds `work_s` from `ready_s` on."""
    low, high = 0, last
    while low < high:  # gaps that end before ready_s + work_s are of no use
        middle = (low + high) // 2
        if gap_end_s[p, middle] < ready_s + work_s:
            low = middle + 1
        else:
            high = middle
    while low < last and max(gap_begin_s[p, low], ready_s) + work_s > gap_end_s[p, low]:
        low += 1
    return low


@inlined
def fill_gap(
    gap_begin_s: FloatArray,
    gap_end_s: FloatArray,
    count: int,
    p: int,
    gap: int,
    begin_s: float,
    end_s: float,
    shortest_s: float,
) -> int:
    """Take `begin_s` to `end_s` out of a gap; what is left of it on either side may be used.

    Returns:
        The number of gaps of device `p`.
    """
    before_s = gap_begin_s[p, gap]
    after_s = gap_end_s[p, gap]
    keep_before = before_s + shortest_s <= begin_s
    keep_after = end_s + shortest_s <= after_s
    if keep_before and keep_after:
        for k in range(count, gap + 1, -1):
            gap_begin_s[p, k] = gap_begin_s[p, k - 1]
            gap_end_s[p, k] = gap_end_s[p, k - 1]
        gap_end_s[p, gap] = begin_s
        gap_begin_s[p, gap + 1] = end_s
        gap_end_s[p, gap + 1] = after_s
        return count + 1
    if keep_before:
        gap_end_s[p, gap] = begin_s
        return count
    if keep_after:
        gap_begin_s[p, gap] = end_s
        return count
    for k in range(gap, count - 1):
        gap_begin_s[p, k] = gap_begin_s[p, k + 1]
        gap_end_s[p, k] = gap_end_s[p, k + 1]
    return count - 1


@inlined
def goes_before(priority: FloatArray, v: int, w: int) -> bool:
    """Whether task `v` is taken before task `w`."""
    return priority[v] > priority[w] or (priority[v] == priority[w] and v < w)


@inlined
def push(heap: IntArray, size: int, priority: FloatArray, v: int) -> int:
    """Add a task to the heap of ready tasks; returns its new size."""
    i = size
    while i > 0 and goes_before(priority, v, heap[(i - 1) // 2]):
        heap[i] = heap[(i - 1) // 2]
        i = (i - 1) // 2
    heap[i] = v
    return size + 1


@inlined
def drop_first(heap: IntArray, size: int, priority: FloatArray) -> int:
    """Take the first task off the heap of ready tasks; returns its new size."""
    size -= 1
    v = heap[size]
    i = 0
    while 2 * i + 1 < size:
        below = 2 * i + 1
        if below + 1 < size and goes_before(priority, heap[below + 1], heap[below]):
            below += 1
        if not goes_before(priority, heap[below], v):
            break
        heap[i] = heap[below]
        i = below
    heap[i] = v
    return size
