"""A DAG of tasks with a duration on each device and data to move along each edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from servegym.cluster.jit import inlined
from servegym.errors import ServeGymError
from servegym.typing import BoolArray, FloatArray, IntArray


class WorkflowError(ServeGymError):
    """Raised when a workflow cannot be read or scheduled as it is."""


class Graph(NamedTuple):
    """Arrays of a workflow, as kernels read them; edges are ordered by parent, then child.

    Moving the data of edge e from device p to another device q takes `transfer_s[e] +
    over_link[e] * latency_s[p, q] + data_bytes[e] * s_per_byte[p, q]`; on the same device, nothing.
    """

    duration_s: FloatArray  # [num_tasks, num_devices]; inf where a task cannot run
    parent: IntArray  # [num_edges]
    child: IntArray  # [num_edges]
    succ_start: IntArray  # [num_tasks + 1]; edges succ_start[v] to succ_start[v + 1] leave task v
    pred_start: IntArray  # [num_tasks + 1]; likewise places in pred_edge, of edges that enter v
    pred_edge: IntArray  # [num_edges]
    order: IntArray  # [num_tasks]; parents before children
    transfer_s: FloatArray  # [num_edges]; the same between any two devices
    over_link: FloatArray  # [num_edges]; 1.0 where the time depends on the link, else 0.0
    data_bytes: FloatArray  # [num_edges]
    latency_s: FloatArray  # [num_devices, num_devices], from, to; 0.0 on the diagonal
    s_per_byte: FloatArray  # [num_devices, num_devices], likewise


@inlined
def moving_s(g: Graph, e: int, p: int, q: int) -> float:
    """Time to move the data of edge `e` from device `p` to device `q`, in seconds."""
    if p == q:
        return 0.0
    return (
        g.transfer_s[e] + g.over_link[e] * g.latency_s[p, q] + g.data_bytes[e] * g.s_per_byte[p, q]
    )


@dataclass(frozen=True)
class Workflow:
    """A named DAG; make it with `make_workflow`, which checks it.

    Due dates and weights are read by rules and scores of tardiness alone.
    """

    name: str
    tasks: tuple[str, ...]
    devices: tuple[str, ...]
    graph: Graph
    due_s: FloatArray | None = None  # [num_tasks]; inf where a task has none
    weight: FloatArray | None = None  # [num_tasks]; None: all 1

    @property
    def num_tasks(self) -> int:
        """Tasks of the graph."""
        return len(self.tasks)

    @property
    def num_devices(self) -> int:
        """Devices that could run them."""
        return len(self.devices)

    @property
    def num_edges(self) -> int:
        """Edges between tasks."""
        return len(self.graph.parent)

    @cached_property
    def mean_duration_s(self) -> FloatArray:
        """Mean over the devices that can run a task, `float64[num_tasks]`."""
        runs = np.isfinite(self.graph.duration_s)
        mean: FloatArray = np.where(runs, self.graph.duration_s, 0.0).sum(1) / runs.sum(1)
        return mean

    @cached_property
    def mean_moving_s(self) -> FloatArray:
        """Mean time to move an edge's data over pairs of distinct devices, `float64[num_edges]`."""
        g = self.graph
        pairs = self.num_devices * (self.num_devices - 1)
        if not pairs:
            return np.zeros(self.num_edges)
        mean: FloatArray = (
            g.transfer_s
            + g.over_link * (g.latency_s.sum() / pairs)
            + g.data_bytes * (g.s_per_byte.sum() / pairs)
        )
        return mean


def make_workflow(
    tasks: Sequence[str],
    devices: Sequence[str],
    duration_s: ArrayLike,
    edges: Sequence[tuple[int, int]] | IntArray,
    *,
    transfer_s: ArrayLike | None = None,
    data_bytes: ArrayLike | None = None,
    latency_s: ArrayLike = 0.0,
    s_per_byte: ArrayLike = 0.0,
    due_s: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    name: str = "workflow",
) -> Workflow:
    """Check a DAG and bring it into the form that kernels read.

    Args:
        tasks: Names, all different.
        devices: Names, all different.
        duration_s: `float64[num_tasks, num_devices]`; inf where a task cannot run, NaN is missing.
        edges: Parent and child of each edge, as positions in `tasks`.
        transfer_s: Time to move an edge's data between any two devices, `float64[num_edges]`.
        data_bytes: Its size instead, `float64[num_edges]`; NaN where `transfer_s` says it all.
        latency_s: Of the link from device to device, `float64[num_devices, num_devices]` or one for
            all; inf where there is no link. Read where an edge has a size.
        s_per_byte: Inverse of the link's bandwidth, likewise.
        due_s: When each task should be finished, `float64[num_tasks]`; inf for no matter when.
        weight: What a second of each task's flow or tardiness counts, likewise.
        name: Shown in results.

    Raises:
        WorkflowError: If a name occurs twice, a duration is missing, a device cannot be reached,
            or the edges form a cycle.
    """
    num_tasks, num_devices = len(tasks), len(devices)
    require_names("task", tasks)
    require_names("device", devices)
    work = np.array(duration_s, float).reshape(num_tasks, num_devices)
    _require_durations(tasks, devices, work)
    due = None if due_s is None else np.array(due_s, float).reshape(num_tasks)
    _require_numbers("due_s", tasks, due, due is None or ~np.isnan(due))
    worth = None if weight is None else np.array(weight, float).reshape(num_tasks)
    _require_numbers("weight", tasks, worth, worth is None or (worth > 0.0) & np.isfinite(worth))
    ends = np.array(edges, np.int64).reshape(-1, 2)
    if ends.size and (ends.min() < 0 or ends.max() >= num_tasks):
        raise WorkflowError(f"an edge of {name} leads to a task that does not exist")
    by_parent = np.lexsort((ends[:, 1], ends[:, 0]))
    ends = ends[by_parent]
    _require_once(tasks, ends)
    times = _per_edge(transfer_s, 0.0, by_parent)
    sizes = _per_edge(data_bytes, np.nan, by_parent)
    over_link = ~np.isnan(sizes)
    for what, values in (("transfer_s", times), ("bytes", np.where(over_link, sizes, 0.0))):
        for e in np.flatnonzero(~((values >= 0.0) & np.isfinite(values)))[:1]:
            raise WorkflowError(
                f"{what} of the edge from {tasks[ends[e, 0]]} to {tasks[ends[e, 1]]} must be a"
                f" number of at least 0, got {values[e]:g}"
            )
    links = [_per_link(values, num_devices) for values in (latency_s, s_per_byte)]
    if over_link.any():
        _require_links(devices, links[0] + links[1])
    else:
        links = [np.zeros((num_devices, num_devices)) for _ in links]
    by_child = np.argsort(ends[:, 1], kind="stable")
    succ_start = np.searchsorted(ends[:, 0], np.arange(num_tasks + 1))
    pred_start = np.searchsorted(ends[by_child, 1], np.arange(num_tasks + 1))
    parent, child = (np.ascontiguousarray(ends[:, i]) for i in (0, 1))
    graph = Graph(
        duration_s=work,
        parent=parent,
        child=child,
        succ_start=succ_start.astype(np.int64),
        pred_start=pred_start.astype(np.int64),
        pred_edge=by_child.astype(np.int64),
        order=_topological_order(tasks, parent, child, succ_start),
        transfer_s=times,
        over_link=over_link.astype(float),
        data_bytes=np.where(over_link, sizes, 0.0),
        latency_s=links[0],
        s_per_byte=links[1],
    )
    return Workflow(name, tuple(tasks), tuple(devices), graph, due, worth)


def require_names(kind: str, names: Sequence[str]) -> None:
    """Refuse an empty list and a name that occurs twice."""
    if not names:
        raise WorkflowError(f"a workflow needs at least one {kind}, got none")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise WorkflowError(f"{kind} {name} occurs twice: give each {kind} its own name")
        seen.add(name)


def _require_durations(tasks: Sequence[str], devices: Sequence[str], work: FloatArray) -> None:
    for v, p in np.argwhere(np.isnan(work))[:1]:
        raise WorkflowError(f"task {tasks[v]} has no duration on device {devices[p]}")
    for v, p in np.argwhere(work < 0.0)[:1]:
        raise WorkflowError(
            f"duration of task {tasks[v]} on device {devices[p]} must be at least 0 s,"
            f" got {work[v, p]:g}"
        )
    for v in np.flatnonzero(np.isinf(work).all(1))[:1]:
        raise WorkflowError(f"task {tasks[v]} can run on none of the devices")


def _require_numbers(
    what: str, tasks: Sequence[str], values: FloatArray | None, right: BoolArray | bool
) -> None:
    if values is not None:
        for v in np.flatnonzero(~np.asarray(right))[:1]:
            above = " above 0" if what == "weight" else ""
            raise WorkflowError(
                f"{what} of task {tasks[v]} must be a number{above}, got {values[v]:g}"
            )


def _require_once(tasks: Sequence[str], ends: IntArray) -> None:
    for e in np.flatnonzero((ends[1:] == ends[:-1]).all(1))[:1]:
        raise WorkflowError(
            f"the edge from {tasks[ends[e, 0]]} to {tasks[ends[e, 1]]} occurs twice:"
            " add up its data"
        )


def _require_links(devices: Sequence[str], cost: FloatArray) -> None:
    for p, q in np.argwhere(~np.isfinite(cost))[:1]:
        raise WorkflowError(
            f"device {devices[q]} cannot be reached from {devices[p]}: give a link between them,"
            " or default_link"
        )
    for p, q in np.argwhere(cost < 0.0)[:1]:
        raise WorkflowError(f"the link from {devices[p]} to {devices[q]} must take at least 0 s")


def _per_edge(values: ArrayLike | None, missing: float, order: IntArray) -> FloatArray:
    wide = np.broadcast_to(np.array(missing if values is None else values, float), order.shape)
    return wide[order]


def _per_link(values: ArrayLike, num_devices: int) -> FloatArray:
    wide = np.broadcast_to(np.array(values, float), (num_devices, num_devices)).copy()
    np.fill_diagonal(wide, 0.0)
    return wide


def _topological_order(
    tasks: Sequence[str], parent: IntArray, child: IntArray, succ_start: IntArray
) -> IntArray:
    """Order tasks so that parents come first; refuse a cycle by naming its tasks."""
    children, start = child.tolist(), succ_start.tolist()
    parents_left = np.bincount(child, minlength=len(tasks)).tolist()
    order = [v for v, count in enumerate(parents_left) if count == 0]
    for v in order:  # grows while it is walked
        for w in children[start[v] : start[v + 1]]:
            parents_left[w] -= 1
            if parents_left[w] == 0:
                order.append(w)
    if len(order) < len(tasks):
        _refuse_cycle(tasks, parent, child, set(range(len(tasks))) - set(order))
    return np.array(order, np.int64)


def _refuse_cycle(tasks: Sequence[str], parent: IntArray, child: IntArray, left: set[int]) -> None:
    # each task left over has a parent left over: going back from any of them ends in a cycle
    back = {w: v for v, w in zip(parent.tolist(), child.tolist(), strict=True) if v in left}
    place: dict[int, int] = {}
    v = min(left)
    while v not in place:
        place[v] = len(place)
        v = back[v]
    cycle = list(place)[place[v] :][::-1]
    first = cycle.index(min(cycle))
    names = [tasks[v] for v in [*cycle[first:], *cycle[: first + 1]]]
    if len(names) > 10:
        names = [*names[:8], "...", names[-1]]
    raise WorkflowError(f"tasks depend on each other in a cycle: {' -> '.join(names)}")
