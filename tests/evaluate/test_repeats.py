"""Seeds and loads that play an episode again are played once, and give no interval."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.baselines.workflow.online.registry import online_rule
from servegym.errors import ConfigError
from servegym.evaluate.compare import paired_difference, paired_ratio, with_interval
from servegym.evaluate.document import evaluation_document
from servegym.evaluate.harness import evaluate
from servegym.evaluate.report import report_page
from servegym.evaluate.saturation import saturation_load
from servegym.evaluate.table import comparison_table
from servegym.evaluate.tune import tune
from servegym.problems.workflow import Workflow
from servegym.scenario.files import parse
from servegym.traced_scenario import with_trace
from servegym.workflow_scenario import WorkflowScenario

HEADER = "arrival_s,prompt_tokens,output_tokens\n"
RULES = [policy("round-robin"), policy("least-outstanding")]


def text_of(table):
    from rich.console import Console

    console = Console(width=160)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.fixture
def write(tmp_path):
    def _write(num, gap_s=0.05):
        path = tmp_path / f"{num}.csv"
        rows = "".join(f"{i * gap_s},{100 + i * 37 % 300},{10 + i % 7}\n" for i in range(num))
        path.write_text(HEADER + rows)
        return str(path)

    return _write


def test_a_trace_not_longer_than_an_episode_is_played_once(make_scenario, write):
    scenario = with_trace(make_scenario(), write(60))
    result = evaluate(scenario, RULES, num_seeds=5)
    assert len(result.seeds) == 1
    assert len(result.runs) == 2
    assert result.seeds_asked == 5
    assert "the 5 seeds make one episode" in result.notes[0]
    assert "60.csv has 60 requests" in result.notes[1]


def test_one_episode_has_no_interval_anywhere(make_scenario, write, undrawn):
    result = evaluate(with_trace(make_scenario(), write(60)), RULES, num_seeds=5)
    table = text_of(comparison_table(result, 1.0, 160))
    assert "[" not in table
    assert "95 % CI" not in table
    assert "one episode" in table
    document = evaluation_document(result)
    for aggregate in document["aggregates"]:
        assert aggregate["ratio"]["ci95"] == [None, None]
        assert aggregate["difference"]["ci95"] == [None, None]
    assert document["seeds_asked"] == 5
    assert document["notes"] == result.notes
    page = report_page(result)
    assert "bootstrap" not in page
    assert "there are no intervals" in page
    assert "the 5 seeds make one episode" in page


def test_a_single_seed_has_no_interval_either(make_scenario):
    result = evaluate(make_scenario(), RULES, num_seeds=1)
    assert result.notes == []
    assert "inf" not in text_of(comparison_table(result, 1.0, 160))


def test_seeds_that_choose_the_same_window_count_once(make_scenario, write):
    scenario = with_trace(make_scenario(num_requests=58), write(60))
    result = evaluate(scenario, RULES[:1], num_seeds=8)
    assert len(result.seeds) == 3  # there are three windows
    assert "8 seeds make 3 different episodes" in result.notes[0]
    assert "windows of 58 requests overlap in the 60 of 60.csv" in result.notes[1]


def test_windows_far_apart_need_no_remark(make_scenario, write):
    scenario = with_trace(make_scenario(num_requests=10), write(400))
    result = evaluate(scenario, RULES[:1], num_seeds=3)
    assert (len(result.seeds), result.notes) == (3, [])


def test_seeds_that_differ_in_the_fleet_are_played_and_say_so(make_scenario, write):
    fleet = [{"gpu": "L40S", "count": 2, "speed": [0.5, 1.0]}]
    result = evaluate(with_trace(make_scenario(fleet=fleet), write(60)), RULES[:1], num_seeds=3)
    assert len(result.seeds) == 3
    assert "fleet, faults or noise alone" in result.notes[-1]


def test_generated_requests_are_repeats(compared):
    assert (len(compared.seeds), compared.seeds_asked, compared.notes) == (3, 3, [])
    assert len(compared.loads) == 2


def test_a_batch_is_played_at_one_load_and_has_goodput(make_scenario, write):
    scenario = with_trace(make_scenario(objective="goodput"), write(60, gap_s=0.0))
    result = evaluate(scenario, RULES, loads=(0.6, 0.8, 1.0), num_seeds=2)
    assert result.loads == [1.0]
    assert "the 3 loads make the same episodes" in result.notes[1]
    run = result.runs[0].metrics
    assert 0 < run["goodput_rps"] < math.inf
    # all its good requests over the time from the arrival to the last finish
    kept = result.trails["round-robin", 1.0].outcomes[12:]
    span = kept["finish_s"].max() - kept["arrival_s"][0]
    assert run["goodput_rps"] == pytest.approx(run["slo_attainment"] * len(kept) / span)
    with pytest.raises(ConfigError, match=r"60\.csv arrive at one time"):
        saturation_load(scenario, RULES[0], 0.9)


def test_what_was_done_to_a_trace_is_in_the_numbers_and_the_report(
    make_scenario, tmp_path, undrawn
):
    path = tmp_path / "odd.csv"
    path.write_text(HEADER + "0,100,10\n1,100,ten\n2,100,10\n3,900,10\n")
    fleet = [{"gpu": "L40S", "num_blocks": 20}]
    scenario = with_trace(
        make_scenario(fleet=fleet), str(path), on_bad_row="skip", too_long="cut", rate_rps=1.0
    )
    result = evaluate(scenario, RULES[:1], num_seeds=1)
    trace = evaluation_document(result)["trace"]
    assert (trace["requests"], trace["skipped_rows"], trace["cut_requests"]) == (3, 1, 1)
    assert trace["tokens_not_played"] == 910 - 320
    assert "line 3" in trace["first_skipped"]
    page = report_page(result)
    assert "cut 1 of 3 requests" in page
    assert "skipped 1 rows" in page


@pytest.fixture
def one_record(tmp_path):
    """Jobs that are all the same record and arrive together."""
    record = {
        "name": "pair",
        "workflow": {
            "tasks": [
                {"name": "x", "runtimeInSeconds": 4, "parents": [], "files": []},
                {"name": "y", "runtimeInSeconds": 6, "parents": ["x"], "files": []},
            ]
        },
    }
    (tmp_path / "pair.json").write_text(json.dumps(record))
    return parse(
        f"""
kind: workflow
name: pairs
devices: [{{name: x1, count: 2}}, {{name: x2}}]
workload: {{kind: wfcommons, path: {tmp_path}}}
num_jobs: 3
""",
        "pairs",
        WorkflowScenario,
    )


def test_jobs_that_are_the_same_for_every_seed_are_played_once(one_record, undrawn):
    rules = [online_rule("fifo"), online_rule("srpt-cp")]
    result = evaluate(one_record, rules, loads=(0.5, 1.0), num_seeds=4)
    assert (len(result.seeds), result.loads, len(result.runs)) == (1, [1.0], 2)
    assert "the 4 seeds make one episode" in result.notes[0]
    assert "[" not in text_of(comparison_table(result, 1.0))
    assert "bootstrap" not in report_page(result)


def test_tuning_is_not_confused_by_loads_that_are_none(one_record):
    found = tune(Workflow(), one_record, "weighted-fair", (0.5, 1.0), budget=2)
    assert found.text in ("weighted-fair", "weighted-fair:alpha=0.4721")


def test_the_text_of_a_comparison_has_an_interval_from_two_pairs_on():
    one, two = np.array([1.0]), np.array([1.0, 2.0])
    assert with_interval(paired_ratio(one, one)) == "1.000"
    assert with_interval(paired_ratio(two, two)) == "1.000 [1.000, 1.000]"
    assert with_interval(paired_difference(one, one), "+.1f", 100) == "+0.0"
    assert with_interval(paired_difference(2 * two, two), "+.0f", 100).startswith("+150 [+100, ")
