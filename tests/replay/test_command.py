"""The command: tables, JSON, page, refit and what it refuses."""

from __future__ import annotations

import json

import pytest

from servegym.cli import main
from servegym.commands.train import Train
from servegym.scenario import load_scenario

from .live import SCENARIO


@pytest.fixture
def live_yaml(tmp_path):
    path = tmp_path / "live.yaml"
    path.write_text(SCENARIO)
    return str(path)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        main(["replay", *map(str, words)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("servegym: ")
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.slow
def test_everything_is_said_and_written(slowed, live_yaml, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new"
    page, numbers = tmp_path / "r.html", tmp_path / "r.json"
    words = ["--scenario", live_yaml, "--policies", "round-robin", "--refit", str(out)]
    main(["replay", str(slowed), *words, "--json", str(numbers), "--report", str(page)])
    said = capsys.readouterr().out
    assert "counterfactual" in said
    assert "replica a100-1: until" in said
    found = json.loads(numbers.read_text())
    assert found["schema"] == "servegym-replay-1"
    assert found["counts"]["simulated"] == found["counts"]["requests"] == 1800
    drifted = {r["replica"]: r["stretches"][-1]["decode"]["drifted"] for r in found["drift"]}
    assert drifted == {"a100-0": False, "a100-1": True, "l40s-0": False}
    mean = {
        when: next(
            f["error"]
            for f in found["held_out"][when]
            if (f["scope"], f["metric"], f["statistic"]) == ("all", "e2e_s", "mean")
        )
        for when in ("before", "after")
    }
    assert abs(mean["after"]) < 0.02 < abs(mean["before"])
    assert [c["policy"] for c in found["counterfactuals"]] == ["as logged", "round-robin"]
    assert not any(c["observed"] for c in found["counterfactuals"])
    html = page.read_text()
    assert html.count("data:image/png") >= 7
    assert "http" not in html.replace("http-equiv", "")
    assert load_scenario(out / "scenario.yaml").fleet[1].calibration


def test_the_fleet_must_be_given(slowed, live_yaml, capsys):
    assert "--config FILE, or a --scenario" in refused(capsys, slowed)
    assert "--config FILE" in refused(
        capsys, slowed, "--config", live_yaml, "--scenario", live_yaml
    )


def test_a_scenario_that_draws_its_fleet_is_refused(slowed, tmp_path, capsys):
    path = tmp_path / "range.yaml"
    path.write_text(SCENARIO.replace("count: 2", "count: [1, 3]"))
    assert "draws count or speed" in refused(capsys, slowed, "--scenario", path)


def test_wrong_logs_are_refused(tmp_path, live_yaml, capsys):
    assert "no trace at" in refused(capsys, tmp_path / "no.jsonl", "--scenario", live_yaml)
    text = tmp_path / "a.jsonl"
    text.write_text("hello\n")
    assert "a.jsonl, line 1: not JSON" in refused(capsys, text, "--scenario", live_yaml)
    assert "tolerance" in refused(capsys, text, "--scenario", live_yaml, "--tolerance", 2)


def test_the_log_is_a_workload_for_evaluate(exact, live_yaml, capsys):
    words = ["--scenario", live_yaml, "--trace", str(exact), "--policies", "round-robin"]
    main(["evaluate", *words, "--seeds", "1", "--loads", "0.8", "--num-requests", "100"])
    assert "live-fleet" in capsys.readouterr().out


def test_the_log_is_a_workload_for_train(exact, live_yaml, tmp_path):
    path = Train(scenario=live_yaml, trace=str(exact)).chosen_file(tmp_path / "run")
    made = load_scenario(path)
    assert made.workload.path == str(exact)
    assert made.fleet == load_scenario(live_yaml).fleet
    assert len(made.episode(0, num_requests=50).table) == 50
