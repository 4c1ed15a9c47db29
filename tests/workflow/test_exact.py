"""Workflows so small that every schedule can be tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from servegym.baselines.workflow.cp_sat import cp_sat
from servegym.baselines.workflow.registry import DAG_RULES
from servegym.workflow.bounds import lower_bound_s
from servegym.workflow.graph import Workflow, make_workflow
from servegym.workflow.schedule import violations


def small(seed: int) -> Workflow:
    """Four tasks on three devices; the link from device to device differs both ways."""
    rng = np.random.default_rng(seed)
    pairs = [(u, v) for v in range(4) for u in range(v) if rng.random() < 0.5]
    return make_workflow(
        [*"abcd"],
        ["p", "q", "r"],
        rng.integers(1, 10, (4, 3)),
        pairs,
        data_bytes=rng.integers(1, 5, len(pairs)),
        latency_s=rng.integers(0, 3, (3, 3)),
        s_per_byte=rng.integers(0, 3, (3, 3)),
    )


def least_makespan_s(flow: Workflow) -> float:
    """Try all orders and all devices, each task as early as it can."""
    g = flow.graph
    edges = list(zip(g.parent.tolist(), g.child.tolist(), strict=True))
    least_s = np.inf
    for order in itertools.permutations(range(flow.num_tasks)):
        if any(order.index(u) > order.index(v) for u, v in edges):
            continue
        for device in itertools.product(range(flow.num_devices), repeat=flow.num_tasks):
            finish_s = dict.fromkeys(range(flow.num_tasks), 0.0)
            avail_s = [0.0] * flow.num_devices
            for v in order:
                begin_s = avail_s[device[v]]
                for e, (u, w) in enumerate(edges):
                    if w == v:
                        p, q = device[u], device[v]
                        link_s = g.latency_s[p, q] + g.data_bytes[e] * g.s_per_byte[p, q]
                        begin_s = max(begin_s, finish_s[u] + (p != q) * link_s)
                finish_s[v] = avail_s[device[v]] = begin_s + g.duration_s[v, device[v]]
            least_s = min(least_s, max(finish_s.values()))
    return least_s


@pytest.mark.parametrize("seed", range(12))
def test_no_rule_beats_the_best_of_all_schedules_nor_that_the_bound(seed):
    flow = small(seed)
    least_s = least_makespan_s(flow)
    assert lower_bound_s(flow) <= least_s
    assert least_s <= min(rule(flow).makespan_s for rule in DAG_RULES.values())


@pytest.mark.parametrize("seed", range(12))
def test_cp_sat_finds_the_best_of_all_schedules(seed):
    pytest.importorskip("ortools")
    flow = small(seed)
    schedule = cp_sat(flow)
    assert violations(schedule) == []
    assert schedule.status == "optimal"
    assert schedule.makespan_s == schedule.bound_s == least_makespan_s(flow)
