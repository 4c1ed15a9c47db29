"""Rules for one machine with due dates: what each is best at, and how far from the least."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.baselines.workflow.atc import LOOK_AHEAD
from servegym.baselines.workflow.edd import edd
from servegym.baselines.workflow.lawler import lawler
from servegym.baselines.workflow.local_search import improve
from servegym.baselines.workflow.moore_hodgson import moore_hodgson
from servegym.baselines.workflow.registry import (
    JOB_SHOP_RULES,
    SINGLE_MACHINE_RULES,
    workflow_rule,
)
from servegym.baselines.workflow.sequence import run_in_order
from servegym.baselines.workflow.wspt import wspt
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.tardiness import tardiness_gaps, total_gaps
from servegym.workflow.dag_file import write_dag
from servegym.workflow.graph import WorkflowError, make_workflow
from servegym.workflow.reader import read_workflow
from servegym.workflow.schedule import violations
from servegym.workflow.tardiness import (
    due_date_scores,
    random_single_machine,
    single_machine,
    tardiness_instance,
)

RULES = SINGLE_MACHINE_RULES | {"spt": JOB_SHOP_RULES["spt"]}


@st.composite
def few_jobs(draw, weighted=False):
    """Up to six jobs with due dates around their total work, ties and zeros among them."""
    count = draw(st.integers(1, 6))
    work_s = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    top = sum(work_s) + 3
    due_s = draw(st.lists(st.integers(-2, top), min_size=count, max_size=count))
    weight = None
    if weighted:
        weight = np.array(draw(st.lists(st.integers(1, 5), min_size=count, max_size=count)), float)
    return single_machine(np.array(work_s, float), np.array(due_s, float), weight)


def of_all_orders(jobs, what):
    return min(
        getattr(due_date_scores(run_in_order(jobs, order)), what)
        for order in itertools.permutations(range(jobs.num_tasks))
    )


def order_of(schedule):
    return np.lexsort((schedule.finish_s, schedule.start_s)).tolist()


@given(few_jobs())
def test_moore_hodgson_has_fewest_late_jobs_of_all_orders(jobs):
    assert due_date_scores(moore_hodgson(jobs)).num_late == of_all_orders(jobs, "num_late")


@given(few_jobs())
def test_earliest_due_date_has_the_least_maximum_lateness_of_all_orders(jobs):
    got = due_date_scores(edd(jobs)).max_lateness_s
    assert got == of_all_orders(jobs, "max_lateness_s")


@given(few_jobs(weighted=True))
def test_shortest_weighted_duration_has_the_least_weighted_flow_of_all_orders(jobs):
    assert due_date_scores(wspt(jobs)).flow_s == of_all_orders(jobs, "flow_s")


@given(few_jobs())
def test_lawler_has_the_least_tardiness_of_all_orders(jobs):
    schedule = lawler(jobs)
    assert schedule.status == "optimal"
    assert due_date_scores(schedule).tardiness_s == of_all_orders(jobs, "tardiness_s")


@pytest.mark.parametrize("number", range(1, 26))
def test_lawler_agrees_with_dynamic_programming_over_sets(number):
    jobs = tardiness_instance(number)
    work_s, due_s = jobs.graph.duration_s[:12, 0], jobs.due_s[:12] * 0.6
    sets = np.arange(1 << 12)
    has = (sets[:, None] >> np.arange(12)) & 1 == 1
    end_s = has @ work_s
    least_s = np.zeros(1 << 12)
    for chosen in sets[1:]:
        last = np.flatnonzero(has[chosen])
        late_s = np.maximum(end_s[chosen] - due_s[last], 0.0)
        least_s[chosen] = (least_s[chosen ^ (1 << last)] + late_s).min()
    got_s = due_date_scores(lawler(single_machine(work_s, due_s))).tardiness_s
    assert got_s == pytest.approx(least_s[-1], rel=1e-12, abs=1e-9)


@given(few_jobs(weighted=True), st.randoms(use_true_random=False))
def test_local_search_is_never_worse_than_where_it_starts(jobs, random):
    order = list(range(jobs.num_tasks))
    random.shuffle(order)
    start = run_in_order(jobs, order)
    better = improve(start)
    assert violations(better) == []
    assert due_date_scores(better).tardiness_s <= due_date_scores(start).tardiness_s


@given(few_jobs(weighted=True))
def test_neither_a_swap_nor_a_move_improves_on_local_search(jobs):
    found = improve(edd(jobs))
    order = order_of(found)
    tardiness_s = due_date_scores(found).tardiness_s
    for i, j in itertools.permutations(range(len(order)), 2):
        moved = order.copy()
        moved.insert(j, moved.pop(i))
        assert due_date_scores(run_in_order(jobs, moved)).tardiness_s >= tardiness_s


@pytest.mark.parametrize("name", list(RULES))
def test_machine_never_waits_and_every_job_runs(name):
    jobs = random_single_machine(30, 0.6, 0.6, seed=1)
    schedule = RULES[name](jobs)
    assert violations(schedule) == []
    assert schedule.makespan_s == jobs.graph.duration_s.sum()


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        ("edd", [2, 0, 1, 3]),
        ("spt", [1, 0, 3, 2]),
        ("wspt", [1, 3, 0, 2]),
        # modified due dates at 0 s: 6, 7, 8, 9; at 3 s: -, 7, 11, 9; at 4 s: -, -, 12, 9
        ("mdd", [0, 1, 3, 2]),
        # job 2 cannot be in time
        ("moore-hodgson", [0, 1, 3, 2]),
    ],
)
def test_order_of_four_jobs_by_hand(rule, order):
    jobs = single_machine(
        np.array([3.0, 1.0, 8.0, 4.0]), np.array([6.0, 7.0, 5.0, 9.0]), np.array([1.0, 1, 1, 2])
    )
    assert order_of(RULES[rule](jobs)) == order


def test_apparent_tardiness_cost_weighs_slack_against_duration():
    # mean duration 3: indices at 0 are 1/4 exp(-0), 1/2 exp(-8 / 6); later both have no slack
    jobs = single_machine(np.array([4.0, 2.0]), np.array([4.0, 10.0]))
    assert LOOK_AHEAD == 2
    assert 0.5 * np.exp(-8 / (LOOK_AHEAD * 3)) < 0.25
    assert order_of(RULES["atc"](jobs)) == [0, 1]
    assert order_of(RULES["atc"](single_machine(np.array([4.0, 2.0]), np.zeros(2)))) == [1, 0]


def test_apparent_tardiness_cost_takes_jobs_without_work_and_without_due_date():
    jobs = single_machine(np.array([5.0, 0.0, 3.0]), np.array([4.0, np.inf, 9.0]))
    assert order_of(RULES["atc"](jobs)) == [1, 0, 2]


@pytest.fixture(scope="module")
def gaps():
    return total_gaps(tardiness_gaps([tardiness_instance(n) for n in range(1, 51)], RULES))


def test_no_rule_has_less_than_the_least_tardiness(gaps):
    assert min(gap for sizes in gaps.values() for gap in sizes.values()) >= 0
    assert gaps["lawler"] == {"20": 0, "50": 0, "all": 0}


def test_modified_due_dates_beat_both_rules_they_join_and_search_beats_all(gaps):
    assert gaps["mdd"]["all"] < 0.02 < 0.2 < min(gaps["edd"]["all"], gaps["spt"]["all"])
    assert gaps["mdd+ls"]["all"] < gaps["mdd"]["all"]
    assert gaps["edd+ls"]["all"] < gaps["mdd"]["all"]
    assert gaps["mdd+ls"]["all"] < 0.004


@pytest.mark.parametrize(("factor", "due_range"), [(0.2, 0.2), (0.6, 1.0), (1.0, 0.4)])
def test_due_dates_are_uniform_over_the_range_asked_for(factor, due_range):
    jobs = random_single_machine(4000, factor, due_range, seed=2)
    total_s = jobs.graph.duration_s.sum()
    low, high = np.maximum(total_s * (1 - factor + np.array([-0.5, 0.5]) * due_range), 0)
    assert low <= jobs.due_s.min()
    assert jobs.due_s.max() <= high
    asked = np.maximum(
        total_s * (1 - factor + due_range * (np.arange(4000) / 4000 - 0.5)), 0.0
    )  # quantiles
    assert np.abs(np.sort(jobs.due_s) - asked).max() < 0.03 * total_s
    duration_s = jobs.graph.duration_s[:, 0]
    assert (duration_s.min(), duration_s.max()) == (1, 100)
    assert abs(duration_s.mean() - 50.5) < 1.5


def test_same_seed_gives_the_same_jobs():
    first, second, other = (
        random_single_machine(9, 0.4, 0.6, seed, weighted=True) for seed in (3, 3, 4)
    )
    assert np.array_equal(first.due_s, second.due_s)
    assert np.array_equal(first.weight, second.weight)
    assert not np.array_equal(first.due_s, other.due_s)


def test_file_keeps_due_dates_and_weights(tmp_path):
    jobs = single_machine(np.array([3.0, 2.0]), np.array([4.5, np.inf]), np.array([1.0, 2.5]))
    write_dag(jobs, tmp_path / "jobs.json")
    again = read_workflow(tmp_path / "jobs.json")
    assert again.due_s.tolist() == [4.5, np.inf]
    assert again.weight.tolist() == [1, 2.5]


def test_command_scores_a_file_with_due_dates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_dag(random_single_machine(20, 0.6, 0.6, seed=5), tmp_path / "jobs.json")
    words = "schedule --dag jobs.json --policies edd,mdd,mdd+ls,lawler --json out.json"
    main([*words.split(), "--plot", "out.html"])
    assert "tardiness, s" in capsys.readouterr().out
    found = {
        entry["policy"]: entry["due_dates"]["tardiness_s"]
        for entry in json.loads((tmp_path / "out.json").read_text())["schedules"]
    }
    assert found["lawler"] <= found["mdd+ls"] <= found["mdd"] < found["edd"]


def test_command_prints_the_table_of_gaps(capsys):
    main(["schedule", "--benchmark", "tardiness", "--instances", "1-5", "--policies", "edd,lawler"])
    said = capsys.readouterr().out
    assert "5 single machines" in said
    assert re.search(r"lawler +│ +0\.0", said)


@pytest.mark.parametrize("name", list(SINGLE_MACHINE_RULES))
def test_workflow_with_edges_or_two_devices_is_refused(name, classic, independent):
    for flow in (classic, independent):
        with pytest.raises(ConfigError, match=r"single-machine rule: .* on one device"):
            workflow_rule(name)(flow)


@pytest.mark.parametrize("name", [name for name in SINGLE_MACHINE_RULES if name != "wspt"])
def test_rule_of_due_dates_asks_for_them(name):
    with pytest.raises(ConfigError, match="give due_s"):
        workflow_rule(name)(make_workflow(["a"], ["p"], [[1.0]], []))


def test_exact_rule_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match="equal weights"):
        lawler(single_machine(np.ones(2), np.ones(2), np.array([1.0, 2.0])))
    with pytest.raises(ConfigError, match="at most 250 jobs, got 251"):
        lawler(single_machine(np.ones(251), np.ones(251)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"due_s": [1, np.nan]}, "due_s of task b must be a number, got nan"),
        ({"weight": [0, 1]}, "weight of task a must be a number above 0, got 0"),
    ],
)
def test_wrong_due_date_or_weight_is_named(values, sentence):
    with pytest.raises(WorkflowError, match=sentence):
        make_workflow(["a", "b"], ["p"], [[1], [1]], [], **values)
