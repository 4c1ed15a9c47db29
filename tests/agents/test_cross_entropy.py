"""A dispatcher searched on whole episodes: where it begins, what it decides, resuming, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from servegym.agents.network import DispatchNetwork
from servegym.baselines.registry import policy
from servegym.cli import main
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_policy
from servegym.policy.layout import agent_actions, agent_arrays
from servegym.policy.run import run
from servegym.train.cross_entropy import CrossEntropyTrainer
from servegym.train.cross_entropy_settings import CrossEntropyTraining
from servegym.train.registry import find_trainer
from servegym.train.search import Search
from servegym.train.validation import Validation, judged

#: Running requests as a share of the slots, an engine's metric.
NUM_RUNNING_INPUT = 10


@pytest.fixture
def settings(write_scenario):
    """Return a maker of settings for short runs, judged by the tail."""
    path = write_scenario(objective="tail")

    def make(**changes) -> CrossEntropyTraining:
        defaults = {
            "scenario": path,
            "load": (0.8, 1.2),
            "max_generations": 5,
            "num_hidden": 2,
            "num_candidates": 6,
            "num_episodes": 2,
            "num_requests": 100,
            "num_validation": 2,
            "validation_requests": 100,
        }
        return CrossEntropyTraining(**{**defaults, **changes})

    return make


class Compared:
    """Acts as a rule and keeps what it chose, beside the logits that a network gives."""

    name, information = "compared", "predictive"

    def __init__(self, rule, network: DispatchNetwork) -> None:
        self.rule, self.network = rule, network
        self.needs = rule.needs | network.needs
        self.chosen, self.logits = [], []

    def reset(self, num_envs: int, seed: int) -> None:
        self.rule.reset(num_envs, seed)

    def act(self, observations, env_ids):
        actions = agent_actions(observations.mask, 0)
        arrays = agent_arrays(observations, actions, extended=self.network.config.extended)
        with torch.inference_mode():
            self.logits.append(self.network(*map(torch.from_numpy, arrays)).numpy())
        self.chosen.append(self.rule.act(observations, env_ids))
        return self.chosen[-1]


def taken(scenario, episodes, by) -> list[np.ndarray]:
    """Play episodes; return who got which request."""
    simulator = Simulator(scenario.spec, episodes)
    run(simulator, by)
    return [simulator.outcomes(env)["replica"] for env in range(len(episodes))]


INFERRED = "added-delay-inferred:prefill=2,decode=0.3,shrink=0.8,observed=0.5,displaced=9"


@pytest.mark.parametrize(
    "base", ["prefix-load:weight=0.02,eta=0.6", "added-delay:prefill=2,decode=0.3", INFERRED]
)
def test_it_begins_as_the_rule_that_it_corrects(settings, tmp_path, base):
    trainer = CrossEntropyTrainer(settings(base=base), tmp_path / "run")
    begun = trainer._rule(trainer.search.mean)
    got, want = (taken(trainer.scenario, trainer._validation, x) for x in (begun, policy(base)))
    np.testing.assert_array_equal(got, want)
    assert {0, 1} <= set(got[0].tolist())


@pytest.mark.parametrize(
    ("base", "extended"),
    [("prefix-load", False), ("added-delay", False), (INFERRED, False), (INFERRED, True)],
)
def test_the_compiled_rule_decides_as_the_network_that_is_exported(
    settings, tmp_path, base, extended
):
    trainer = CrossEntropyTrainer(settings(base=base, extended=extended), tmp_path / "run")
    rng = np.random.default_rng(0)
    theta = trainer.space.with_units(trainer.search.mean, 3, rng)
    theta += 0.5 * rng.normal(size=len(theta))
    rule = trainer._rule(theta)
    compared = Compared(rule, trainer.space.network(theta))
    run(Simulator(trainer.scenario.spec, trainer._validation), compared)
    chosen, logits = np.concatenate(compared.chosen), np.concatenate(compared.logits)
    assert len(chosen) == 200
    assert (logits.argmax(-1) != chosen).sum() <= 2  # single precision makes ties of what is near
    given = logits[np.arange(200), chosen]
    np.testing.assert_allclose(given, logits.max(-1), rtol=1e-4, atol=1e-3)
    got, begun = (taken(trainer.scenario, trainer._validation, x) for x in (rule, policy(base)))
    assert any((a != b).any() for a, b in zip(got, begun, strict=True))


def test_of_a_rule_with_shares_these_stay_and_the_rest_is_searched(settings, tmp_path):
    trainer = CrossEntropyTrainer(settings(base=INFERRED, eta=2.0), tmp_path / "run")
    np.testing.assert_allclose(np.exp(trainer.search.mean[:4]), [2.0, 2.0, 0.3, 9.0])
    moved = trainer.search.mean.copy()
    moved[:4] += np.log(2.0)
    config = trainer.space.network(moved).config
    assert (config.base, config.extended) == ("added-delay-inferred", True)
    assert (config.eta, *config.base_params) == pytest.approx((4.0, 4.0, 0.6, 0.8, 0.5, 18.0))


def test_the_score_reads_metrics_that_the_rule_does_not(settings, tmp_path):
    trainer = CrossEntropyTrainer(settings(base="added-delay"), tmp_path / "run")
    assert NUM_RUNNING_INPUT in trainer.space._linear


def test_the_tail_is_judged_by_the_99th_percentile_of_ttft(settings, tmp_path):
    trainer = CrossEntropyTrainer(settings(), tmp_path / "run")
    simulator = Simulator(trainer.scenario.spec, trainer._validation)
    run(simulator, policy("mct"))
    ends = [simulator.outcomes(env) for env in range(2)]
    want = [np.percentile(x["first_token_s"] - x["arrival_s"], 99) for x in ends]
    found = judged(trainer.scenario, trainer._validation, policy("mct"))
    np.testing.assert_allclose(np.exp(found.scores), want)
    assert found.objective == pytest.approx(np.mean(want))
    held = Validation(trainer.scenario, loads=[1.0], num_episodes=2, num_requests=100)
    assert (held.play(policy("mct")).scores < held.play(policy("random")).scores).all()


def test_what_is_found_is_what_the_exported_policy_plays(settings, tmp_path):
    trainer = CrossEntropyTrainer(settings(max_generations=10), tmp_path / "run")
    trainer.run()
    assert trainer.generation == 10
    assert trainer.gain > 0.0
    path = trainer.export()
    got = judged(trainer.scenario, trainer._validation, resolve_policy(str(path)))
    np.testing.assert_allclose(got.scores, trainer.best_scores, rtol=1e-9)
    text = (path.parent / "card.md").read_text()
    assert "p99 TTFT, over that of the rule it begins as" in text
    assert "--learner cross-entropy" in text


class Killed(Exception):
    pass


def test_a_killed_search_ends_as_an_uninterrupted_one(settings, tmp_path, monkeypatch):
    whole = CrossEntropyTrainer(settings(), tmp_path / "whole")
    whole.run()
    real, made = Search.update, []

    def update(self, *arguments):
        made.append(self)
        if len(made) > 3:  # in the second stage
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "update", update)
        with pytest.raises(Killed):
            CrossEntropyTrainer(settings(), tmp_path / "parts").run()
    again = CrossEntropyTrainer(settings(), tmp_path / "parts")
    again.run()
    assert again.generation == whole.generation == 5
    assert torch.equal(again.best, whole.best)
    np.testing.assert_array_equal(again.best_scores, whole.best_scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"base": "mct"},
            "base must be one of added-delay, prefix-load, added-delay-inferred, got 'mct'",
        ),
        ({"base": "prefix-load:eta=0"}, "weight, eta of base must be above 0, got 'prefix-load:et"),
        ({"base": "added-delay-inferred"}, "prefill, decode, displaced of base must be above 0"),
        ({"eta": 0.0}, "eta must be above 0, got 0"),
        ({"num_hidden": -1}, "num_hidden must be at least 0, got -1"),
        ({"load": (1.0, 0.5)}, "load must be two ascending numbers above 0"),
        ({"max_minutes": 0.0}, "minutes must be above 0, got 0"),
        ({"num_episodes": 0}, "num_episodes must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, changes, said):
    with pytest.raises(ConfigError, match=said):
        settings(**changes)


def test_fleets_that_move_kv_are_refused(tmp_path):
    config = CrossEntropyTraining(scenario="pd-unequal")
    with pytest.raises(ConfigError, match="take --learner search"):
        CrossEntropyTrainer(config, tmp_path / "run")
    assert find_trainer("dispatch", "cross-entropy").trainer is CrossEntropyTrainer


def test_the_command_trains_and_exports_again(settings, tmp_path, capsys):
    out, config = tmp_path / "learned", settings()
    words = ["train", "--scenario", config.scenario, "--learner", "cross-entropy"]
    sizes = ["--num-candidates", "4", "--num-validation", "2", "--validation-requests", "60"]
    main([*words, *sizes, "--max-generations", "2", "--num-requests", "60", "--out", str(out)])
    assert "which no budget counts" in capsys.readouterr().out
    before = (out / "policy" / "weights.npz").read_bytes()
    main(["export", "--run-folder", str(out)])
    assert before == (out / "policy" / "weights.npz").read_bytes()
