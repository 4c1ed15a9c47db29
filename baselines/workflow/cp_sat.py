"""The exact reference: a constraint solver proves the least makespan, or how near it is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from servegym.baselines.workflow.heft import heft
from servegym.errors import ConfigError
from servegym.typing import FloatArray, IntArray
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule

#: Seconds are counted in whole units; where durations are no whole numbers, HEFT's makespan has
#: this many.
RESOLUTION = 100_000


def cp_sat(
    workflow: Workflow, time_limit_s: float = 10.0, num_workers: int = 1, seed: int = 0
) -> Schedule:
    """Search for the least makespan until it is proved or the time is up; starts from HEFT.

    Durations that are no whole numbers are rounded up to 1/100,000 of HEFT's makespan while
    searching. The schedule returned has exact times, and `bound_s` allows for the rounding.

    Args:
        workflow: What to schedule.
        time_limit_s: Of the search.
        num_workers: Threads; more than one makes results depend on timing.
        seed: Of the search.

    Returns:
        A schedule with `status` "optimal" (within the rounding, none is shorter) or "feasible", and
        with `bound_s`, which no schedule can beat.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ConfigError("cp-sat needs OR-Tools: pip install ortools") from error
    start = heft(workflow)
    unit_s, whole = _unit_s(workflow, start.makespan_s)
    model = cp_model.CpModel()
    variables = _build(model, workflow, start, unit_s)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = num_workers
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    # each task and each transfer on the longest chain may have been rounded up by one unit
    slack = 0 if whole else 2 * workflow.num_tasks
    bound_s = max(0.0, (solver.best_objective_bound - slack) * unit_s)
    found = start
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        starts, chosen = variables
        order_units = np.array([solver.value(s) for s in starts])
        device = np.array([int(np.argmax([solver.value(x) for x in row])) for row in chosen])
        found = _timed(workflow, device, order_units)
        found = found if found.makespan_s <= start.makespan_s else start
    proved = status == cp_model.OPTIMAL
    return Schedule(
        workflow,
        found.device_idx,
        found.start_s,
        found.finish_s,
        status="optimal" if proved else "feasible",
        bound_s=bound_s,
    )


def _unit_s(workflow: Workflow, makespan_s: float) -> tuple[float, bool]:
    """Length of a unit and whether every time is a whole number of them."""
    g = workflow.graph
    links_s = g.data_bytes[:, None, None] * g.s_per_byte + g.over_link[:, None, None] * g.latency_s
    times = [g.duration_s[np.isfinite(g.duration_s)], g.transfer_s, links_s.ravel()]
    if all((x == np.round(x)).all() for x in times) and makespan_s < 1e9:
        return 1.0, True
    return makespan_s / RESOLUTION, False


def _units(time_s: float, unit_s: float) -> int:
    return math.ceil(time_s / unit_s)


def _build(model: Any, workflow: Workflow, start: Schedule, unit_s: float) -> tuple[Any, Any]:
    """Add variables and constraints; returns the start and the device choices of each task."""
    g = workflow.graph
    num_tasks, num_devices = workflow.num_tasks, workflow.num_devices
    # rounding up may lengthen HEFT's own schedule by one unit a task and transfer
    horizon = _units(start.makespan_s, unit_s) + 2 * num_tasks
    intervals: list[list[Any]] = [[] for _ in range(num_devices)]
    starts, ends, chosen = [], [], []
    for v in range(num_tasks):
        begin = model.new_int_var(0, horizon, "")
        end = model.new_int_var(0, horizon, "")
        row = []
        for p in range(num_devices):
            here = model.new_bool_var("")
            row.append(here)
            if not math.isfinite(g.duration_s[v, p]):
                model.add(here == 0)
                continue
            work = _units(float(g.duration_s[v, p]), unit_s)
            intervals[p].append(model.new_optional_interval_var(begin, work, end, here, ""))
            model.add_hint(here, int(start.device_idx[v] == p))
        model.add_exactly_one(row)
        model.add_hint(begin, _units(float(start.start_s[v]), unit_s))
        starts.append(begin)
        ends.append(end)
        chosen.append(row)
    for p in range(num_devices):
        model.add_no_overlap(intervals[p])
    for e in range(workflow.num_edges):
        u, v = int(g.parent[e]), int(g.child[e])
        model.add(starts[v] >= ends[u])
        _add_transfers(model, workflow, e, (starts[v], ends[u]), (chosen[u], chosen[v]), unit_s)
    makespan = model.new_int_var(0, horizon, "")
    model.add_max_equality(makespan, ends)
    model.minimize(makespan)
    return starts, chosen


def _add_transfers(
    model: Any,
    workflow: Workflow,
    e: int,
    times: tuple[Any, Any],
    devices: tuple[Any, Any],
    unit_s: float,
) -> None:
    """Make the child wait for the data wherever the two run on different devices."""
    g = workflow.graph
    begin, end = times
    at, to = devices
    between_s = g.transfer_s[e] + g.over_link[e] * g.latency_s + g.data_bytes[e] * g.s_per_byte
    wait = np.ceil(between_s / unit_s).astype(int)
    for p in range(workflow.num_devices):
        elsewhere = [q for q in range(workflow.num_devices) if q != p]
        # one constraint for the least wait; where links are alike, no further ones are needed
        least = min((int(wait[p, q]) for q in elsewhere), default=0)
        if least:
            model.add(begin >= end + least).only_enforce_if(at[p], to[p].negated())
        for q in elsewhere:
            if wait[p, q] > least:
                model.add(begin >= end + int(wait[p, q])).only_enforce_if(at[p], to[q])


def _timed(workflow: Workflow, device: IntArray, order_units: IntArray) -> Schedule:
    """Keep devices and order; start each task as early as exact times allow."""
    g = workflow.graph
    position = np.empty(workflow.num_tasks, np.int64)
    position[g.order] = np.arange(workflow.num_tasks)
    start_s, finish_s = np.zeros(workflow.num_tasks), np.zeros(workflow.num_tasks)
    avail_s: FloatArray = np.zeros(workflow.num_devices)
    for v in np.lexsort((position, order_units)):
        q = device[v]
        ready_s = avail_s[q]
        for e in g.pred_edge[g.pred_start[v] : g.pred_start[v + 1]]:
            p = device[g.parent[e]]
            between_s = (
                g.transfer_s[e]
                + g.over_link[e] * g.latency_s[p, q]
                + g.data_bytes[e] * g.s_per_byte[p, q]
            )
            ready_s = max(ready_s, finish_s[g.parent[e]] + (0.0 if p == q else between_s))
        start_s[v] = ready_s
        finish_s[v] = avail_s[q] = ready_s + g.duration_s[v, q]
    return Schedule(workflow, device, start_s, finish_s)
