"""Measures of a schedule, bounds on it and what makes it impossible."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.registry import DAG_RULES
from servegym.workflow.bounds import critical_path_s, lower_bound_s
from servegym.workflow.generate import RandomDag
from servegym.workflow.graph import make_workflow
from servegym.workflow.schedule import Schedule, violations


@pytest.fixture
def pair() -> Schedule:
    """A parent on p until 2, 3 s of moving, its child on q until 9."""
    flow = make_workflow(["a", "b"], ["p", "q"], [[2, 3], [6, 4]], [(0, 1)], transfer_s=[3.0])
    return Schedule(flow, np.array([0, 1]), np.array([0.0, 5.0]), np.array([2.0, 9.0]))


def test_measures_by_hand(pair):
    assert pair.makespan_s == 9
    assert critical_path_s(pair.workflow) == 2 + 4
    assert pair.slr == 9 / 6
    assert pair.speedup == 7 / 9  # both on q
    assert pair.efficiency == 7 / 18
    assert pair.mean_flow_s == 9


def test_measures_of_the_classic_example(classic):
    schedule = heft(classic)
    # T1 on P3, T2 on P1, T9 on P2, T10 on P2: 9 + 13 + 12 + 7
    assert critical_path_s(classic) == 41
    assert schedule.slr == pytest.approx(80 / 41)
    assert schedule.speedup == pytest.approx(127 / 80)  # all on the first or second device


def test_speedup_is_nan_when_no_device_can_run_all():
    flow = make_workflow(["a", "b"], ["p", "q"], [[1, math.inf], [math.inf, 1]], [])
    assert math.isnan(heft(flow).speedup)


def test_workflow_without_work_has_no_ratios():
    schedule = heft(make_workflow(["a"], ["p"], [[0]], []))
    assert schedule.makespan_s == 0
    assert math.isnan(schedule.slr)
    assert math.isnan(schedule.speedup)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"finish_s": [2.0, 8.0]}, "b does not take 4 s"),
        ({"start_s": [0.0, 4.0], "finish_s": [2.0, 8.0]}, "b starts before the data of a is there"),
        ({"start_s": [-1.0, 5.0], "finish_s": [1.0, 9.0]}, "a starts before 0 s"),
    ],
)
def test_violation_is_named(pair, changes, sentence):
    assert violations(pair) == []
    wrong = replace(pair, **{key: np.array(value) for key, value in changes.items()})
    assert violations(wrong) == [sentence]


def test_overlap_is_named():
    flow = make_workflow(["a", "b"], ["p"], [[2], [2]], [])
    both = Schedule(flow, np.zeros(2, int), np.array([0.0, 1.0]), np.array([2.0, 3.0]))
    assert violations(both) == ["a and b overlap on p"]


def test_lower_bound_is_the_critical_path_when_tasks_depend_on_each_other():
    flow = make_workflow(["a", "b"], ["p", "q"], [[2, 3], [6, 4]], [(0, 1)], transfer_s=[3.0])
    assert lower_bound_s(flow) == 6


def test_lower_bound_is_the_shared_work_when_tasks_are_many():
    flow = make_workflow([*"abcdef"], ["p", "q"], [[1, 2]] * 6, [])
    assert lower_bound_s(flow) == 3


def test_lower_bound_counts_what_only_one_device_can_do():
    inf = math.inf
    # on q: 3 + 4, not before the shorter of the parents (1), and 2 s of a child to follow
    flow = make_workflow(
        ["x", "y", "b", "c", "z"],
        ["p", "q"],
        [[1, inf], [2, inf], [inf, 3], [inf, 4], [2, inf]],
        [(0, 2), (1, 3), (2, 4), (3, 4)],
    )
    assert lower_bound_s(flow) == 1 + 7 + 2


@pytest.mark.parametrize("seed", range(5))
def test_no_rule_beats_the_lower_bound(seed):
    flow = RandomDag(num_tasks=40, num_devices=4).sample(seed)
    bound_s = lower_bound_s(flow)
    assert bound_s >= critical_path_s(flow) > 0
    for rule in DAG_RULES.values():
        assert rule(flow).makespan_s >= bound_s
