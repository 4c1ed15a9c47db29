"""What holds for every problem: scenarios, rules, tuning, comparison, commands."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from servegym.cli import main
from servegym.errors import ConfigError
from servegym.evaluate.document import evaluation_document
from servegym.evaluate.harness import FIRST_SEED, evaluate
from servegym.evaluate.report import report_page
from servegym.evaluate.saturation import saturation_load
from servegym.evaluate.tune import BUDGET, NUM_SEEDS, candidates, resolve, tune
from servegym.problems.problem import Problem
from servegym.problems.registry import (
    PROBLEMS,
    find_problem,
    load_problem,
    problem_of,
    scenario_names,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
#: A scenario, a pair of rules, one that can be tuned, and how much is played of each problem.
CASES = {
    "dispatch": ("failures", ("round-robin", "added-delay"), "speed-family", 60),
    "order": ("kv-starved", ("fcfs", "srpt"), "trail", 60),
    "workflow": ("text-to-sql", ("fifo", "srpt-cp-oracle"), "weighted-fair", 6),
}
EVERY = pytest.mark.parametrize("name", CASES)


def posed(name):
    """The problem of that name, its scenario, rules, tunable rule and size."""
    scenario, rules, tunable, num_units = CASES[name]
    problem, loaded = load_problem(scenario)
    return problem, loaded, rules, tunable, num_units


def test_every_problem_is_tried_here():
    assert set(CASES) == set(PROBLEMS)


@pytest.mark.parametrize("scenario", scenario_names())
def test_every_scenario_is_of_one_problem(scenario):
    problem, loaded = load_problem(scenario)
    assert [p for p in PROBLEMS.values() if p.owns(loaded)] == [problem]
    assert [p for p in PROBLEMS.values() if scenario in p.scenario_names()] == [problem]
    assert problem_of(loaded) is problem
    assert loaded.name == scenario
    assert problem.fleet(loaded)
    assert problem.pace(loaded)


@pytest.mark.parametrize("wrong", ["text-to-sq", "kv-starvd", "mixd-chat"])
def test_a_wrong_name_is_met_with_the_nearest_of_any_problem(wrong):
    with pytest.raises(ConfigError, match=r"unknown scenario.*did you mean .*-.*give a .yaml file"):
        load_problem(wrong)
    with pytest.raises(ConfigError, match=r"unknown problem 'dispach'.*did you mean dispatch"):
        find_problem("dispach")


@EVERY
def test_default_policies_are_rules_of_the_problem(name):
    problem = PROBLEMS[name]
    assert set(problem.default_policies) <= set(problem.rules.names())
    for scenario in problem.scenario_names():
        played = problem.find(scenario)
        assert len({problem.resolve(text).name for text in problem.compared(played)}) > 5
    assert problem.default_policy in problem.rules.names()
    features = problem.contract().features.values()
    assert all(len(set(columns)) == len(columns) > 0 for columns in features)


@EVERY
def test_evaluation_is_the_same_twice_and_has_what_tables_show(name):
    problem, scenario, rules, _, num_units = posed(name)
    once, again = (
        evaluate(scenario, [problem.resolve(r) for r in rules], num_seeds=2, num_units=num_units)
        for _ in range(2)
    )
    assert [run.metrics for run in once.runs] == [
        pytest.approx(run.metrics, rel=0, abs=0, nan_ok=True) for run in again.runs
    ]
    assert once.seeds == [FIRST_SEED, FIRST_SEED + 1]
    assert once.learned == []
    shown = {column.metric for column in problem.columns} | {once.objective.metric}
    for run in once.runs:
        assert shown <= set(run.metrics)
    means = [once.mean(rule, 1.0, once.objective.metric) for rule, _ in once.ranking(1.0)]
    assert means == sorted(means, reverse=once.objective.more_is_better)
    document = evaluation_document(once)
    assert document["problem"] == name
    assert {row["ratio"]["metric"] for row in document["aggregates"]} == {once.objective.metric}


@EVERY
def test_losses_are_the_objective_of_the_same_episodes(name):
    problem, scenario, rules, _, num_units = posed(name)
    episodes = problem.episodes(scenario, [0, 1, 2], num_units=num_units)
    losses = episodes.losses(problem.resolve(rules[0]))
    assert losses.shape == (3,)
    np.testing.assert_array_equal(losses, episodes.losses(problem.resolve(rules[0])))
    assert len(set(losses)) > 1 or (losses == -1).all()
    assert (losses < 0).all() == problem.objective(scenario).more_is_better
    assert all(taken > 0 for taken in episodes.time_decisions(problem.resolve(rules[0])))


@EVERY
def test_tuning_takes_the_best_of_its_candidates_on_training_seeds(name, monkeypatch):
    problem, scenario, _, tunable, num_units = posed(name)
    drawn = []
    episodes = type(problem).episodes

    def recorded(self, scenario, seeds, **options):
        drawn.extend((seed, options["load"]) for seed in seeds)
        return episodes(self, scenario, seeds, **options)

    monkeypatch.setattr(type(problem), "episodes", recorded)
    loads = (0.8, 1.2)
    options = {"budget": 4, "num_seeds": 2, "num_units": num_units}
    found = tune(problem, scenario, tunable, loads, **options)
    assert drawn == [(0, 0.8), (1, 0.8), (0, 1.2), (1, 1.2)]
    texts = candidates(problem.parts(tunable), 4)
    assert texts[0] == tunable
    assert len(set(texts)) == 4
    losses = {
        text: np.mean(
            [
                problem.episodes(scenario, [0, 1], load=load, num_units=num_units).losses(
                    problem.resolve(text)
                )
                for load in loads
            ]
        )
        for text in texts
    }
    assert losses[found.text] == min(losses.values()) == pytest.approx(found.loss)


@EVERY
def test_a_tuned_rule_is_the_tuners_answer_with_the_stated_budget(name, monkeypatch):
    problem, scenario, rules, tunable, num_units = posed(name)
    tried = []
    made = problem.resolve
    monkeypatch.setattr(problem, "resolve", lambda text: tried.append(text) or made(text))
    policy = resolve(problem, scenario, f"{tunable}:tuned", (1.0,), num_units)
    monkeypatch.undo()
    assert tried[:BUDGET] == candidates(problem.parts(tunable), BUDGET)
    assert policy.name == tune(problem, scenario, tunable, (1.0,), num_units=num_units).text
    assert NUM_SEEDS == 4
    with pytest.raises(ConfigError, match=f"unknown tunable .* '{rules[0]}': choose one of"):
        resolve(problem, scenario, f"{rules[0]}:tuned", (1.0,))


@EVERY
def test_candidates_fill_their_ranges(name):
    problem = PROBLEMS[name]
    assert problem.rules.tunable()
    for rule, ranges in problem.rules.tunable().items():
        texts = candidates(problem.parts(rule), 64)[1:]
        values = [
            dict(part.split("=") for part in text.partition(":")[2].split(",")) for text in texts
        ]
        for key, (low, high, logarithmic) in ranges.items():
            got = np.array([float(row[key]) for row in values])
            if logarithmic:
                got, low, high = np.log(got), math.log(low), math.log(high)
            share = np.sort((got - low) / (high - low))
            assert -1e-3 < share[0] < 0.1
            assert 0.9 < share[-1] < 1.001
            assert np.diff(share).max() < 0.1


@EVERY
def test_commands_take_scenarios_of_every_problem(name, tmp_path, capsys):
    scenario, rules, tunable, num_units = CASES[name]
    few = ["--scenario", scenario, "--num-requests", str(num_units), "--seeds", "1"]
    main(["simulate", *few])
    shown = capsys.readouterr().out
    assert f"{PROBLEMS[name].default_policy} on {scenario}" in shown
    assert PROBLEMS[name].columns[0].metric in shown
    main(["tune", *few, "--policy", tunable, "--budget", "2", "--loads", "1"])
    assert f"{tunable}" in capsys.readouterr().out
    path, plot = tmp_path / "out.json", tmp_path / "chart.png"
    pytest.importorskip("matplotlib")
    words = ["--policies", *rules, "--loads", "1", "--json", str(path), "--plot", str(plot)]
    main(["evaluate", *few, *words, "--report", str(tmp_path / "page.html")])
    assert json.loads(path.read_text())["problem"] == name
    assert plot.read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "page.html").read_text()
    for figure in PROBLEMS[name].figures:
        assert f"<h2>{figure.title.format(load=1)}</h2>" in page
    main(["policies", "--problem", name])
    listed = capsys.readouterr().out
    assert all(rule in listed for rule in problem_rules(name))


def problem_rules(name: str) -> list[str]:
    return list(PROBLEMS[name].rules)


def test_explained_costs_are_those_of_each_kind_of_replica(capsys):
    main(["simulate", "--scenario", "text-to-sql", "--num-requests", "2", "--explain"])
    shown = capsys.readouterr().out
    problem, scenario = load_problem("text-to-sql")
    assert all(f"{gpu} — ms per step" in shown for gpu in problem.step_costs(scenario))


def test_a_problem_of_ones_own_is_tuned_compared_and_reported():
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("matplotlib")
    example = runpy.run_path(str(EXAMPLES / "05_pose_a_problem.py"), run_name="example")
    problem, scenario = example["BatchingProblem"](), example["Bursts"](num_bursts=5)
    with pytest.raises(ConfigError, match="bursts is a scenario of none of dispatch"):
        problem_of(scenario)
    rules = [resolve(problem, scenario, text, (1.0,)) for text in problem.default_policies]
    learned = dataclasses.replace(problem.resolve("quiet:gap_s=0.5"), learned=True)
    result = evaluate(scenario, [*rules, learned], problem=problem, num_seeds=3)
    assert result.learned == ["quiet:gap_s=0.5"]
    assert result.best_heuristic(1.0) == rules[1].name != "quiet"
    document = evaluation_document(result)
    assert document["problem"] == "batching"
    assert document["scenario"]["num_bursts"] == 5
    page = report_page(result)
    verdict = (
        "quiet:gap_s=0.5 is worse than"
        if result.ratio("quiet:gap_s=0.5", rules[1].name, 1.0).low > 1
        else "quiet:gap_s=0.5 is not distinguishable from"
    )
    assert verdict in page
    with pytest.raises(ConfigError, match="batching has no largest load"):
        saturation_load(scenario, rules[0], 0.9, problem=problem)


def test_a_problem_without_a_largest_load_says_so():
    class Bare(Problem):
        name = "bare"
        contract = objective = episodes = key = None

    with pytest.raises(ConfigError, match="bare has no largest load to search for: leave"):
        Bare().require_saturation(None)
    assert Bare().scenario_names() == []
    assert Bare().find("mixed-chat") is None
