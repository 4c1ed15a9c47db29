"""Compiled rules against plain ones, written line by line from their definitions."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.baselines.workflow.registry import DAG_RULES
from servegym.workflow.graph import Workflow, WorkflowError, make_workflow
from servegym.workflow.schedule import violations


class Plain:
    """A workflow as dictionaries; whole numbers on 1, 2 or 4 devices keep all means exact."""

    def __init__(self, flow: Workflow) -> None:
        g = flow.graph
        self.tasks, self.devices = range(flow.num_tasks), range(flow.num_devices)
        self.work = g.duration_s.tolist()
        self.edges = {
            (u, v): (g.transfer_s[e], g.over_link[e], g.data_bytes[e])
            for e, (u, v) in enumerate(zip(g.parent.tolist(), g.child.tolist(), strict=True))
        }
        self.latency, self.per_byte = g.latency_s, g.s_per_byte
        self.parents = {v: [u for u, w in self.edges if w == v] for v in self.tasks}
        self.children = {v: [w for u, w in self.edges if u == v] for v in self.tasks}
        self.where: dict[int, int] = {}
        self.start: dict[int, float] = {}
        self.finish: dict[int, float] = {}

    def moving(self, u, v, p, q):
        fixed, over, size = self.edges[u, v]
        if p == q:
            return 0.0
        return fixed + over * self.latency[p, q] + size * self.per_byte[p, q]

    def mean_moving(self, u, v):
        pairs = [(p, q) for p in self.devices for q in self.devices if p != q]
        return sum(self.moving(u, v, p, q) for p, q in pairs) / len(pairs) if pairs else 0.0

    def mean_work(self, v):
        return sum(self.work[v]) / len(self.devices)

    def rank_u(self, v):
        ahead = (self.mean_moving(v, w) + self.rank_u(w) for w in self.children[v])
        return self.mean_work(v) + max(ahead, default=0.0)

    def rank_d(self, v):
        return max(
            (self.rank_d(u) + self.mean_work(u) + self.mean_moving(u, v) for u in self.parents[v]),
            default=0.0,
        )

    def oct(self, v, p):
        return max(
            (
                min(
                    self.oct(w, q) + self.work[w][q] + (q != p) * self.mean_moving(v, w)
                    for q in self.devices
                )
                for w in self.children[v]
            ),
            default=0.0,
        )

    def ready_tasks(self):
        return [
            v
            for v in self.tasks
            if v not in self.where and all(u in self.where for u in self.parents[v])
        ]

    def ready(self, v, p):
        return max(
            (self.finish[u] + self.moving(u, v, self.where[u], p) for u in self.parents[v]),
            default=0.0,
        )

    def avail(self, p):
        return max((self.finish[v] for v, q in self.where.items() if q == p), default=0.0)

    def start_in_gap(self, v, p):
        busy = sorted((self.start[u], self.finish[u]) for u, q in self.where.items() if q == p)
        ends = [0.0, *(end for _, end in busy)]
        begins = [*(begin for begin, _ in busy), math.inf]
        for gap_start, gap_end in zip(ends, begins, strict=True):
            begin = max(gap_start, self.ready(v, p))
            if begin + self.work[v][p] <= gap_end:
                return begin
        raise AssertionError

    def start_behind(self, v, p):
        return max(self.avail(p), self.ready(v, p))

    def put(self, v, p, begin):
        self.where[v], self.start[v], self.finish[v] = p, begin, begin + self.work[v][p]

    def by_priority(self, priority, cost, start):
        while ready := self.ready_tasks():
            v = max(ready, key=lambda v: (priority[v], -v))
            p = min(self.devices, key=lambda p: (cost(v, p), p))
            self.put(v, p, start(v, p))

    def finish_in_gap(self, v, p):
        return self.start_in_gap(v, p) + self.work[v][p]

    def heft(self):
        ranks = [self.rank_u(v) for v in self.tasks]
        self.by_priority(ranks, self.finish_in_gap, self.start_in_gap)

    def cpop(self):
        priority = [self.rank_u(v) + self.rank_d(v) for v in self.tasks]
        entries = [v for v in self.tasks if not self.parents[v]]
        path = [max(entries, key=lambda v: (priority[v], -v))]
        while self.children[path[-1]]:
            same = [w for w in self.children[path[-1]] if priority[w] == priority[path[0]]]
            path.append(min(same))
        best = min(self.devices, key=lambda p: (sum(self.work[v][p] for v in path), p))

        def cost(v, p):
            return math.inf if v in path and p != best else self.finish_in_gap(v, p)

        self.by_priority(priority, cost, self.start_in_gap)

    def peft(self):
        ranks = [sum(self.oct(v, p) for p in self.devices) / len(self.devices) for v in self.tasks]
        self.by_priority(
            ranks, lambda v, p: self.finish_in_gap(v, p) + self.oct(v, p), self.start_in_gap
        )

    def completion(self, v, p):
        return self.start_behind(v, p) + self.work[v][p]

    def mct(self):
        self.by_priority([0] * len(self.tasks), self.completion, self.start_behind)

    def met(self):
        self.by_priority([0] * len(self.tasks), lambda v, p: self.work[v][p], self.start_behind)

    def olb(self):
        self.by_priority([0] * len(self.tasks), lambda v, p: self.avail(p), self.start_behind)

    def in_batches(self, cost, preference):
        while ready := self.ready_tasks():
            costs = {v: sorted((cost(v, p), p) for p in self.devices) for v in ready}
            v = min(ready, key=lambda v: (preference([c for c, _ in costs[v]]), v))
            self.put(v, costs[v][0][1], self.start_behind(v, costs[v][0][1]))

    def min_min(self):
        self.in_batches(self.completion, lambda costs: costs[0])

    def max_min(self):
        self.in_batches(self.completion, lambda costs: -costs[0])

    def sufferage(self):
        self.in_batches(self.completion, lambda costs: costs[0] - [*costs, math.inf][1])

    def etf(self):
        self.in_batches(self.start_behind, lambda costs: costs[0])


@st.composite
def workflows(draw, *, restricted: bool = False) -> Workflow:
    """Small DAGs with whole numbers, tasks in any order, times on edges or links; many ties."""
    n = draw(st.integers(1, 9))
    devices = draw(st.sampled_from([1, 2, 4]))
    numbers = st.integers(0 if restricted else 1, 9)
    work = np.array(
        draw(st.lists(numbers, min_size=n * devices, max_size=n * devices)), float
    ).reshape(n, devices)
    if restricted:
        runs = draw(st.lists(st.booleans(), min_size=n * devices, max_size=n * devices))
        blocked = ~np.array(runs).reshape(n, devices)
        blocked[:, 0] &= ~blocked.all(1)
        work[blocked] = np.inf
    name = draw(st.permutations(range(n)))
    pairs = [(u, v) for v in range(n) for u in range(v)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    size = draw(st.lists(st.integers(0, 12), min_size=len(chosen), max_size=len(chosen)))
    by_link = np.array(
        draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen))), bool
    )
    # one latency and bandwidth for all but one pair; halves and quarters stay exact, and with four
    # devices the mean over twelve pairs does where all links are equal
    per_byte = np.full((devices, devices), float(draw(st.sampled_from([0.25, 0.5, 1.0]))))
    if devices == 2:
        per_byte[0, 1] *= 2
    return make_workflow(
        [f"t{i}" for i in range(n)],
        [f"d{p}" for p in range(devices)],
        work,
        [(name[u], name[v]) for u, v in chosen],
        transfer_s=np.where(by_link, 0.0, np.array(size, float)),
        data_bytes=np.where(by_link, np.array(size, float), np.nan),
        latency_s=float(draw(st.integers(0, 3))),
        s_per_byte=per_byte,
    )


@settings(max_examples=300, deadline=None)
@given(flow=workflows())
def test_compiled_rules_equal_the_plain_ones(flow):
    assert len(DAG_RULES) == 10
    for name, rule in DAG_RULES.items():  # to draw a workflow takes longer than all of them
        plain = Plain(flow)
        getattr(plain, name.replace("-", "_"))()
        schedule = rule(flow)
        assert schedule.device_idx.tolist() == [plain.where[v] for v in plain.tasks], name
        assert schedule.start_s.tolist() == [plain.start[v] for v in plain.tasks], name
        assert schedule.finish_s.tolist() == [plain.finish[v] for v in plain.tasks], name


@settings(max_examples=300, deadline=None)
@given(flow=workflows(restricted=True))
def test_schedules_can_be_carried_out(flow):
    plain = Plain(flow)
    assert len(DAG_RULES) == 10
    for name, rule in DAG_RULES.items():
        try:
            schedule = rule(flow)
        except WorkflowError:
            assert name == "cpop"  # no device can run the whole critical path
            continue
        require_carried_out(plain, schedule)


def require_carried_out(plain, schedule):
    """Check that tasks wait for those before them, and devices do one after the other."""
    for v in plain.tasks:
        p = schedule.device_idx[v]
        assert schedule.finish_s[v] == schedule.start_s[v] + plain.work[v][p] < math.inf
        for u in plain.parents[v]:
            there_s = schedule.finish_s[u] + plain.moving(u, v, schedule.device_idx[u], p)
            assert there_s <= schedule.start_s[v]
        for u in plain.tasks:
            if u != v and schedule.device_idx[u] == p:
                before = schedule.finish_s[u] <= schedule.start_s[v]
                assert before or schedule.finish_s[v] <= schedule.start_s[u]
    assert violations(schedule) == []
