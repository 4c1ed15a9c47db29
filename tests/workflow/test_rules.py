"""Each rule on graphs small enough to schedule by hand."""

from __future__ import annotations

import pytest

from servegym.baselines.workflow.cpop import cpop
from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.met import met
from servegym.baselines.workflow.peft import peft
from servegym.baselines.workflow.registry import rule_names, workflow_rule
from servegym.errors import ConfigError
from servegym.workflow.graph import WorkflowError, make_workflow
from servegym.workflow.ranks import optimistic_costs, rank_downward, rank_upward


def placed(schedule) -> dict[str, tuple[str, float, float]]:
    flow = schedule.workflow
    return {
        task: (flow.devices[schedule.device_idx[v]], schedule.start_s[v], schedule.finish_s[v])
        for v, task in enumerate(flow.tasks)
    }


def test_upward_ranks_of_the_classic_example(classic):
    expected = [108, 77, 80, 80, 69, 63.333, 42.667, 35.667, 44.333, 14.667]
    assert rank_upward(classic) == pytest.approx(expected, abs=5e-4)


def test_downward_rank_of_the_exit_leads_back_along_the_critical_path(classic):
    # 13 + 18 + 16.667 + 16 + 16.667 + 13: T1, T2, T9 and what lies between them and T10
    assert rank_downward(classic)[[0, 9]] == pytest.approx([0, 93.333], abs=5e-4)


@pytest.mark.parametrize(("rule", "makespan_s"), [(heft, 80), (cpop, 86), (peft, 85)])
def test_makespan_of_the_classic_example(classic, rule, makespan_s):
    assert rule(classic).makespan_s == makespan_s


def test_heft_schedules_the_classic_example_as_the_paper_draws_it(classic):
    assert placed(heft(classic)) == {
        "T1": ("P3", 0, 9),
        "T2": ("P1", 27, 40),
        "T3": ("P3", 9, 28),
        "T4": ("P2", 18, 26),
        "T5": ("P3", 28, 38),
        "T6": ("P2", 26, 42),
        "T7": ("P3", 38, 49),
        "T8": ("P1", 57, 62),
        "T9": ("P2", 56, 68),
        "T10": ("P2", 73, 80),
    }


def test_cpop_runs_the_critical_path_of_the_classic_example_on_the_second_device(classic):
    where = placed(cpop(classic))
    assert {where[task][0] for task in ("T1", "T2", "T9", "T10")} == {"P2"}


@pytest.mark.parametrize(
    ("rule", "devices", "makespan_s"),
    [
        # mean durations 5, 4, 8.5: c on p to 8, a on q to 6, b ends at 11 on either
        ("heft", {"a": "q", "b": "p", "c": "p"}, 11),
        # nothing lies ahead, so all ranks are 0: a on p to 4, b on q to 5, c on p to 12
        ("peft", {"a": "p", "b": "q", "c": "p"}, 12),
        # b first, on p to 3; then a, on q to 6; then c, on p to 11
        ("min-min", {"a": "q", "b": "p", "c": "p"}, 11),
        # c first, on p to 8; then a, on q to 6; then b, which ends at 11 on either
        ("max-min", {"a": "q", "b": "p", "c": "p"}, 11),
        # a and b lose 2, c only 1: a on p to 4; now b loses 2, c 3: c on q to 9; b on p to 7
        ("sufferage", {"a": "p", "b": "p", "c": "q"}, 9),
        ("mct", {"a": "p", "b": "q", "c": "p"}, 12),
        ("met", {"a": "p", "b": "p", "c": "p"}, 15),
        ("olb", {"a": "p", "b": "q", "c": "p"}, 12),
        ("etf", {"a": "p", "b": "q", "c": "p"}, 12),
        # every task is its own critical path; the longest, c, is the one that is kept
        ("cpop", {"a": "q", "b": "p", "c": "p"}, 11),
    ],
)
def test_independent_tasks(independent, rule, devices, makespan_s):
    schedule = workflow_rule(rule)(independent)
    assert {task: place[0] for task, place in placed(schedule).items()} == devices
    assert schedule.makespan_s == makespan_s


def gap(length_s: float):
    """A parent on p and a child on q leave q idle until 5 s; `late` comes last."""
    return make_workflow(
        ["parent", "child", "late"],
        ["p", "q"],
        [[2, 9], [9, 2], [4, length_s]],
        [(0, 1)],
        transfer_s=[3.0],
    )


def test_heft_fills_a_gap_that_is_just_long_enough():
    assert placed(heft(gap(5)))["late"] == ("q", 0, 5)


def test_heft_leaves_a_gap_that_is_too_short():
    assert placed(heft(gap(5.5)))["late"] == ("p", 2, 6)


def test_rules_without_insertion_go_behind_the_last_task():
    assert placed(workflow_rule("mct")(gap(5)))["late"] == ("p", 2, 6)
    assert placed(met(gap(3)))["late"] == ("q", 7, 10)


def test_heft_uses_what_is_left_on_both_sides_of_a_filled_gap():
    inf = float("inf")
    # on q, "last" waits for "first" until 10 and "middle" for "before" until 4
    flow = make_workflow(
        ["first", "last", "before", "middle", "after", "one", "two"],
        ["p", "q", "r"],
        [
            [10, inf, inf],
            [inf, 10, inf],
            [inf, inf, 4],
            [inf, 2, inf],
            [inf, inf, 10],
            [inf, 4, inf],
            [inf, 4, inf],
        ],
        [(0, 1), (2, 3), (3, 4)],
    )
    where = placed(heft(flow))
    on_q = {task: place[1:] for task, place in where.items() if place[0] == "q"}
    assert on_q == {"one": (0, 4), "middle": (4, 6), "two": (6, 10), "last": (10, 20)}


def test_transfers_depend_on_the_link_they_go_over():
    # 100 bytes: 1 s from p to q, 10 s from p to r
    flow = make_workflow(
        ["a", "b"],
        ["p", "q", "r"],
        [[1, 50, 50], [50, 5, 4]],
        [(0, 1)],
        data_bytes=[100.0],
        s_per_byte=[[0, 0.01, 0.1], [0.01, 0, 0.1], [0.1, 0.1, 0]],
    )
    assert placed(heft(flow))["b"] == ("q", 2, 7)


def test_peft_looks_ahead_where_heft_does_not():
    # a ends sooner on p, but its only child runs on q and the data takes 10 s
    flow = make_workflow(["a", "b"], ["p", "q"], [[2, 3], [100, 1]], [(0, 1)], transfer_s=[10.0])
    assert optimistic_costs(flow).tolist() == [[11, 1], [0, 0]]
    assert heft(flow).makespan_s == 13
    assert peft(flow).makespan_s == 4


def test_task_without_duration_still_waits_for_its_parent():
    # with zero durations the ranks of all tasks are equal, and the file lists the child first
    flow = make_workflow(["child", "parent"], ["p"], [[0], [0]], [(1, 0)])
    for name in ("heft", "cpop", "peft"):
        assert workflow_rule(name)(flow).makespan_s == 0


def test_cpop_refuses_a_critical_path_that_no_device_can_run():
    inf = float("inf")
    flow = make_workflow(["a", "b"], ["p", "q"], [[1, inf], [inf, 1]], [(0, 1)])
    with pytest.raises(WorkflowError, match=r"none can run a -> b$"):
        cpop(flow)


def test_job_shop_rule_refuses_other_workflows(classic):
    with pytest.raises(ConfigError, match="spt is a job-shop rule: classic must be chains"):
        workflow_rule("spt")(classic)


def test_unknown_rule_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match="did you mean heft"):
        workflow_rule("heff")
    assert len(set(rule_names())) == len(rule_names()) == 26


@pytest.mark.parametrize(
    ("second_s", "first"),
    [
        (0.1 + 0.2, "a"),  # 0.3 but for its last bit: a tie, so the file decides
        (0.3 + 1e-9, "b"),
    ],
)
def test_only_ranks_that_differ_by_no_more_than_rounding_are_ties(second_s, first):
    flow = make_workflow(["a", "b"], ["p"], [[0.3], [second_s]], [])
    assert placed(heft(flow))[first][1] == 0
