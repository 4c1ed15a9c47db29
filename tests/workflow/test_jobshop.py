"""Dispatching rules by hand, and benchmark instances whose least makespan is known."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.workflow.cp_sat import cp_sat
from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.registry import JOB_SHOP_RULES
from servegym.errors import ConfigError
from servegym.workflow.bounds import lower_bound_s
from servegym.workflow.generate import RandomDag, random_job_shop
from servegym.workflow.jobshop import job_shop
from servegym.workflow.reader import read_workflow
from servegym.workflow.schedule import violations

SHOPS = sorted((Path(__file__).parent / "job_shops").glob("*.txt"))


def least_makespan_s(path: Path) -> int:
    return int(re.search(r"least makespan (\d+)", path.read_text(encoding="utf-8")).group(1))


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        # jobs 0 to 2 all begin on machine 0 with 3, 2 and 4 s and go on with 1, 9 and 2 s elsewhere
        ("spt", [1, 0, 2]),
        ("lpt", [2, 0, 1]),
        ("fifo", [0, 1, 2]),
        ("mwkr", [1, 2, 0]),
        ("lwkr", [0, 2, 1]),
        ("mopnr", [0, 1, 2]),
        ("lopnr", [0, 1, 2]),
    ],
)
def test_order_on_the_first_machine(rule, order):
    shop = job_shop(np.array([[0, 1]] * 3), np.array([[3.0, 1.0], [2.0, 9.0], [4.0, 2.0]]))
    schedule = JOB_SHOP_RULES[rule](shop)
    assert np.argsort(schedule.start_s[[0, 2, 4]]).tolist() == order


@pytest.mark.parametrize(("rule", "start_s"), [("mopnr", [1, 2]), ("lopnr", [5, 1])])
def test_operations_left_decide_between_jobs_of_which_one_is_further(rule, start_s):
    # at 1 s the second of three operations of job 0 and the last of job 1 want machine 1
    shop = job_shop(np.array([[0, 1, 2], [2, 3, 1]]), np.array([[1.0, 1.0, 5.0], [0.5, 0.5, 4.0]]))
    schedule = JOB_SHOP_RULES[rule](shop)
    assert schedule.start_s[[1, 5]].tolist() == start_s


@pytest.mark.parametrize("rule", list(JOB_SHOP_RULES))
def test_schedule_is_non_delay(rule):
    shop = random_job_shop(6, 4, seed=1)
    schedule = JOB_SHOP_RULES[rule](shop)
    assert violations(schedule) == []
    finish_s = schedule.finish_s.reshape(6, 4)
    ready_s = np.hstack([np.zeros((6, 1)), finish_s[:, :-1]]).ravel()
    for v in range(shop.num_tasks):
        here = np.flatnonzero(schedule.device_idx == schedule.device_idx[v])
        # from the moment it is ready until it starts, its machine is busy
        others = here[here != v]
        ends_s = np.minimum(schedule.finish_s[others], schedule.start_s[v])
        begins_s = np.maximum(schedule.start_s[others], ready_s[v])
        busy_s = np.maximum(ends_s - begins_s, 0.0).sum()
        assert busy_s == schedule.start_s[v] - ready_s[v]


@pytest.mark.parametrize("path", SHOPS, ids=lambda path: path.stem)
def test_no_rule_beats_the_least_makespan(path):
    shop, least_s = read_workflow(path), least_makespan_s(path)
    assert lower_bound_s(shop) <= least_s
    for name, rule in (JOB_SHOP_RULES | {"heft": heft}).items():
        schedule = rule(shop)
        assert violations(schedule) == [], name
        assert schedule.makespan_s >= least_s, name


@pytest.mark.parametrize(
    "path", [path for path in SHOPS if path.stem != "ft10"], ids=lambda path: path.stem
)
def test_cp_sat_proves_the_least_makespan(path):
    pytest.importorskip("ortools")
    schedule = cp_sat(read_workflow(path))
    assert violations(schedule) == []
    assert (schedule.status, schedule.makespan_s) == ("optimal", least_makespan_s(path))
    assert schedule.bound_s == schedule.makespan_s


def test_cp_sat_proves_the_classic_example(classic):
    pytest.importorskip("ortools")
    schedule = cp_sat(classic)
    assert violations(schedule) == []
    assert (schedule.status, schedule.makespan_s, schedule.bound_s) == ("optimal", 73, 73)


def test_cp_sat_bounds_what_it_cannot_prove_in_time():
    pytest.importorskip("ortools")
    shop = random_job_shop(15, 15, seed=0)
    schedule = cp_sat(shop, time_limit_s=1.0)
    assert schedule.status == "feasible"
    assert violations(schedule) == []
    assert 0 < schedule.bound_s < schedule.makespan_s
    for name, rule in JOB_SHOP_RULES.items():
        assert schedule.bound_s <= rule(shop).makespan_s, name


@pytest.mark.parametrize("seed", range(3))
def test_cp_sat_is_at_least_as_good_as_heft_with_durations_of_any_length(seed):
    pytest.importorskip("ortools")
    flow = RandomDag(num_tasks=10, num_devices=3).sample(seed)
    schedule = cp_sat(flow)
    assert violations(schedule) == []
    assert schedule.bound_s <= schedule.makespan_s <= heft(flow).makespan_s
    assert schedule.bound_s == pytest.approx(schedule.makespan_s, rel=1e-3)


def test_cp_sat_says_how_to_get_its_solver(classic, monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(ConfigError, match="pip install ortools"):
        cp_sat(classic)
