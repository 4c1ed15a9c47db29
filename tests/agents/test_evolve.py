"""Evolving scores: operators, what a generation keeps, and a run from start to file."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import yaml

from servegym.baselines.score import RULES_AS_SCORES
from servegym.cli import main
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_policy
from servegym.policy.expression import NUMBER, Expression, number, parse
from servegym.train.evolution import (
    Evolution,
    Proportions,
    drawn,
    part_at,
    places_of,
    with_other_numbers,
    with_part,
)
from servegym.train.evolve import EvolveTrainer
from servegym.train.evolve_settings import EvolveTraining

FLEET = {
    "name": "unequal",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [50.0], "max_tokens": 200},
    },
}


@pytest.fixture
def unequal(tmp_path):
    path = tmp_path / "unequal.yaml"
    path.write_text(yaml.safe_dump(FLEET))
    return str(path)


def settings(scenario, **changes):
    small = EvolveTraining(
        scenario=scenario,
        load=(0.8, 1.2),
        max_minutes=math.inf,
        max_generations=6,
        num_candidates=16,
        num_episodes=2,
        num_validation=2,
        num_requests=60,
    )
    return replace(small, **changes)


def test_parts_are_found_and_exchanged_where_they_stand():
    whole = parse("up + 2 * prompt_tokens")
    assert places_of(whole) == [(), (0,), (1,), (1, 0), (1, 1)]
    assert part_at(whole, (1, 0)) == number(2.0)
    assert with_part(whole, (1, 1), parse("up")) == parse("up + 2 * up")
    assert with_part(whole, (), parse("up")) == parse("up")


def test_only_numbers_change_and_at_least_one():
    rng = np.random.default_rng(0)
    whole = parse("up * 2 + 3 - prompt_tokens")
    for _ in range(50):
        other = with_other_numbers(whole, rng)
        assert other != whole
        places = [x for x in places_of(whole) if part_at(whole, x).name != NUMBER]
        assert all(part_at(other, x).name == part_at(whole, x).name for x in places)
    assert with_other_numbers(parse("up"), rng) == parse("up")


def test_drawn_expressions_are_of_all_kinds():
    rng = np.random.default_rng(0)
    many = [drawn(rng, levels=4) for _ in range(2000)]
    names = {x.name for whole in many for x in (part_at(whole, p) for p in places_of(whole))}
    assert {"+", "<", "where", "negative", "mean", NUMBER, "up", "expected_tokens"} <= names
    assert max(x.depth for x in many) <= 5  # a number may be a negative one


def miss(target: float):
    """Loss of a score that is to be a number: by how much it is wrong, where it is one at all."""

    def loss(expression: Expression) -> float:
        numbers = [part_at(expression, x) for x in places_of(expression)]
        values = [x.value for x in numbers if x.name == NUMBER]
        return min((abs(math.log(max(v, 1e-9) / target)) for v in values), default=50.0)

    return loss


def test_numbers_are_found_by_evolution():
    evolution = Evolution([parse("up + 1")], Proportions(24, 20, 1e-4))
    rng = np.random.default_rng(1)
    for _ in range(40):
        evolution.step(miss(37.0), rng)
    assert evolution.best.loss < 0.05
    assert evolution.best.expression.fields()


def test_a_generation_has_no_twins_and_keeps_within_its_limits():
    evolution = Evolution([parse("up + 1"), parse("up")], Proportions(30, 9, 0.0))
    rng = np.random.default_rng(1)
    played: list[Expression] = []
    for _ in range(5):
        played.clear()
        evolution.step(lambda x: played.append(x) or rng.random(), rng)
        assert len({str(x) for x in played}) == len(played) == 30
        assert max(x.size for x in played) <= 15  # what is drawn when nothing else fits
        assert len(evolution.population) == 15


def test_luck_wears_off():
    """The mean of all generations counts, so a score that was lucky once is not the best."""
    evolution = Evolution([parse("up"), parse("waited_s")], Proportions(4, 20, 0.0))
    rng = np.random.default_rng(0)
    for round_ in range(6):
        lucky = 5.0 if round_ else -1.0
        evolution.step(lambda x, lucky=lucky: {"up": 0.5, "waited_s": lucky}.get(str(x), 9.0), rng)
    assert str(evolution.best.expression) == "up"
    assert evolution.best.loss == 0.5


def test_a_price_on_parts_keeps_scores_short():
    sizes = []
    for price in (0.0, 0.1):
        evolution = Evolution([parse("up + 1")], Proportions(24, 60, price))
        rng = np.random.default_rng(2)
        for _ in range(15):
            evolution.step(lambda x: 0.0, rng)
        sizes.append(np.mean([x.expression.size for x in evolution.population]))
    assert sizes[1] < 3 < sizes[0]


def test_a_run_begins_as_the_rule_and_writes_a_policy(unequal, tmp_path):
    trainer = EvolveTrainer(settings(unequal), tmp_path / "run")
    found = trainer.run()
    assert trainer.gain >= 0.0
    assert trainer.generation == 6
    assert trainer.lines["added-delay"] == pytest.approx(np.exp(trainer.first_scores).mean())
    path = trainer.export()
    assert json.loads(path.read_text()) == {"score": str(found)}
    assert resolve_policy(str(path)).name == "run"


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(unequal, tmp_path, monkeypatch):
    whole = EvolveTrainer(settings(unequal), tmp_path / "whole")
    whole.run()
    broken = EvolveTrainer(settings(unequal), tmp_path / "broken")
    real = broken.improve

    def improve():
        if broken.generation == 3:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(broken, "improve", improve)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = EvolveTrainer(settings(unequal), tmp_path / "broken")
    again.run()
    assert again.evolution.state() == whole.evolution.state()
    assert again.best == whole.best


def test_a_run_begins_with_scores_that_are_given(unequal, tmp_path):
    trainer = EvolveTrainer(settings(unequal, starts=("waited_s + up",)), tmp_path / "run")
    texts = [str(x.expression) for x in trainer.evolution.population]
    assert texts[-1] == "waited_s + up"
    assert len(texts) == len(RULES_AS_SCORES) + 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load": (1.0, 0.5)}, "load must be two ascending numbers above 0"),
        ({"max_minutes": 0.0}, "minutes must be above 0"),
        ({"price": -1.0}, "price must be at least 0"),
        ({"max_parts": 500}, "max_parts must be from 1 to 255, got 500"),
        ({"num_candidates": 3}, "num_candidates must be at least 4"),
        ({"num_episodes": 0}, "num_episodes must be at least 1"),
    ],
)
def test_wrong_settings_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        settings("mixed-chat", **changes)


def test_wrong_starts_and_fleets_are_refused(unequal, tmp_path):
    with pytest.raises(ConfigError, match="unknown feature or function of a score 'speed'"):
        EvolveTrainer(settings(unequal, starts=("speed",)), tmp_path / "run")
    with pytest.raises(ConfigError, match="requests are placed or ordered, too"):
        EvolveTrainer(settings("pd-unequal"), tmp_path / "run")


def test_the_command_trains_and_judges(unequal, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--num-candidates", "8", "--num-episodes", "1", "--num-validation", "1"]
    words = ["train", "--scenario", unequal, "--learner", "evolve", "--max-generations", "1"]
    main([*words, *small, "--num-requests", "40"])
    assert "policy: runs/evolve-unequal/policy/score.json" in capsys.readouterr().out
    main(["simulate", "--scenario", unequal, "--policy", "runs/evolve-unequal/policy/score.json"])
    assert "evolve-unequal" in capsys.readouterr().out
