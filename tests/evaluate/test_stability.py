"""Comparisons in worlds in which kernels and engines are off."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.costs.uncertainty import World
from servegym.errors import ConfigError
from servegym.evaluate.document import evaluation_document
from servegym.evaluate.harness import evaluate
from servegym.evaluate.report import report_page
from servegym.evaluate.stability import Stability, play_worlds
from servegym.problems.dispatch import DispatchEpisodes
from servegym.problems.registry import load_problem, problem_of

RULES = ("least-outstanding", "random")


def played(scenario, num_worlds=4):
    return play_worlds(
        problem_of(scenario),
        scenario,
        [policy(name) for name in RULES],
        loads=[1.0],
        seeds=[7, 8],
        num_worlds=num_worlds,
    )


def test_bands_and_wins_are_counted_over_worlds(make_scenario):
    objective = problem_of(make_scenario()).objective(make_scenario())
    e2e = {"a": [1.0, 2.0, 3.0, 4.0], "b": [1.5, 1.5, 3.5, 4.5]}
    found = Stability(objective, ["a", "b"], [1.0], [0], 4)
    found.metrics = {(k, 1.0): [{"e2e_mean_s": x} for x in values] for k, values in e2e.items()}
    assert found.wins("a", "b", 1.0) == 3
    assert found.wins("b", "a", 1.0) == 1
    assert found.first("a", 1.0) == 3
    assert found.sentences(1.0) == ["a beats b in 3 of 4 worlds"]
    assert found.band("a", 1.0, "e2e_mean_s") == pytest.approx((1.15, 3.85))
    assert np.isnan(found.band("a", 1.0, "nothing")).all()


def test_worlds_differ_from_the_prediction_and_are_the_same_again(make_scenario):
    scenario = make_scenario()
    first, again = played(scenario), played(scenario)
    assert first.metrics == again.metrics
    values = first.values("random", 1.0, "tpot_mean_s")
    assert len(set(values)) == 4
    result = evaluate(scenario, [policy("random")], num_seeds=2, first_seed=7)
    predicted = result.mean("random", 1.0, "tpot_mean_s")
    assert 0.7 * predicted < np.median(values) < 1.4 * predicted
    grids = [s.spec.types[0].grid for s in (scenario, make_scenario(), scenario.in_world(World(0)))]
    # worlds leave the scenario as it was
    assert [grid.dense_s.tolist() == grids[0].dense_s.tolist() for grid in grids] == [1, 1, 0]


def test_factor_on_ttft_moves_first_tokens_alone(make_scenario):
    scenario = make_scenario()
    drawn = [scenario.episode(7)]
    plain, late = (
        DispatchEpisodes(scenario, drawn, ttft_factor=factor).play(policy("random")).metrics[0]
        for factor in (1.0, 30.0)
    )
    assert late["ttft_p90_s"] == pytest.approx(30.0 * plain["ttft_p90_s"])
    assert late["slo_attainment"] < plain["slo_attainment"]
    same = [key for key in plain if key.startswith(("tpot", "e2e", "itl", "busy"))]
    assert [late[key] for key in same] == [plain[key] for key in same]


def test_document_and_page_show_the_bands(make_scenario, undrawn):
    scenario = make_scenario()
    result = evaluate(scenario, [policy(name) for name in RULES], num_seeds=2, first_seed=7)
    assert evaluation_document(result)["uncertainty"] is None
    result.stability = played(scenario)
    found = evaluation_document(result)["uncertainty"]
    assert (found["num_worlds"], found["seeds"]) == (4, [7, 8])
    low, high = found["bands"][0]["band90"]["tpot_mean_s"]
    assert low < high
    assert "In 4 worlds with other kernels and engines" in report_page(result)


def test_jobs_have_no_bands():
    problem, scenario = load_problem("text-to-sql")
    with pytest.raises(ConfigError, match="leave --uncertainty out"):
        problem.episodes_in(World(0), scenario, [0])
