"""A dispatcher searched on whole episodes: where it begins, what it decides, resuming, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from servegym.agents.network import DispatchNetwork
from servegym.agents.network_config import NetworkConfig
from servegym.baselines.registry import policy
from servegym.cli import main
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.export.manifest import read_manifest
from servegym.export.resolve import resolve_policy
from servegym.policy.contract import Group
from servegym.policy.costs import HELD_BASES
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
        actions = agent_actions(observations.mask, self.network.config.num_extra)
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
HELD = "added-delay-held:prefill=2,decode=0.3,wait=0.02,most=0.42,shrink=0.8"


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


@pytest.fixture
def held_settings(settings, write_scenario):
    """Return a maker of settings for short runs that begin as a rule that holds."""
    small = {"fleet": [{"gpu": "H100-SXM-80GB", "num_blocks": 200}, {"gpu": "L40S", "count": 2}]}
    path = write_scenario(actions={"hold": True}, **small)

    def make(**changes) -> CrossEntropyTraining:
        return settings(**{"scenario": path, "base": HELD, "load": (3.0, 4.0), **changes})

    return make


def fates(scenario, episodes, by) -> tuple[np.ndarray, np.ndarray]:
    """Play episodes; return who got which request, and how often each was held."""
    simulator = Simulator(scenario.spec, episodes)
    run(simulator, by)
    ends = [simulator.outcomes(env) for env in range(len(episodes))]
    return tuple(np.array([x[name] for x in ends]) for name in ("replica", "num_holds"))


def test_it_begins_as_the_rule_that_holds(held_settings, tmp_path):
    trainer = CrossEntropyTrainer(held_settings(), tmp_path / "run")
    begun = trainer._rule(trainer.search.mean)
    got, want = (fates(trainer.scenario, trainer._validation, x) for x in (begun, policy(HELD)))
    np.testing.assert_array_equal(got, want)
    assert want[1].max() == 9  # of 0.05 s: after 0.42 s it is let go
    assert 10 < (want[1] > 0).sum() < want[1].size
    np.testing.assert_allclose(np.exp(trainer.search.mean[:4]), [10.0, 2.0, 0.3, 0.02])


def test_whom_to_hold_can_be_searched_alone(held_settings, tmp_path):
    trainer = CrossEntropyTrainer(held_settings(holds_only=True), tmp_path / "run")
    theta = trainer.search.mean + 0.5
    network = trainer.space.network(theta)
    assert len(theta) == 4 + 11  # the rule's numbers, and how full it is there and so on
    assert not network.score.weight[0, 2:].any()
    assert not network.actor.own[0].weight[:2].any()  # those that pass the score of replicas
    assert network.hold.weight[0, :4].tolist() == [0.0, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("extended", [False, True])
def test_holds_of_the_compiled_rule_are_those_of_the_network(held_settings, tmp_path, extended):
    trainer = CrossEntropyTrainer(held_settings(extended=extended), tmp_path / "run")
    rng = np.random.default_rng(1)
    theta = trainer.space.with_units(trainer.search.mean, 3, rng)
    theta += 0.1 * rng.normal(size=len(theta))
    rule, network = trainer._rule(theta), trainer.space.network(theta)
    compared = Compared(rule, network)
    simulator = Simulator(trainer.scenario.spec, trainer._validation)
    run(simulator, compared)
    chosen, logits = np.concatenate(compared.chosen), np.concatenate(compared.logits)
    holds = sum(int(simulator.outcomes(env)["num_holds"].sum()) for env in range(2))
    assert len(chosen) == 200 + holds
    assert (chosen == 3).sum() == holds > 50
    assert (logits.argmax(-1) != chosen).mean() <= 0.01  # what is near is a tie in float32
    given = logits[np.arange(len(chosen)), chosen]
    np.testing.assert_allclose(given, logits.max(-1), rtol=1e-4, atol=2e-3)
    begun = fates(trainer.scenario, trainer._validation, policy(HELD))
    assert (begun[1] != fates(trainer.scenario, trainer._validation, rule)[1]).any()


def test_without_extended_no_weight_is_given_to_what_is_not_seen(held_settings, tmp_path):
    trainer = CrossEntropyTrainer(held_settings(), tmp_path / "run")
    theta = trainer.space.with_units(trainer.search.mean, 2, np.random.default_rng(0)) + 0.5
    first = trainer.space.network(theta).actor.own[0].weight.detach().numpy()
    unseen = [25, 26, 29, 30, *range(32, 38)]  # of step times and limits
    assert not first[:, unseen].any()
    assert {28, 40, 41} <= set(np.flatnonzero(first.any(0)).tolist())  # length, on hold, waited
    rule = trainer._rule(theta)
    assert not rule.needs & (Group.LIMITS | Group.STEP_TIMES)
    assert rule.needs & Group.LENGTHS


def test_what_is_found_of_holds_is_what_the_exported_policy_plays(held_settings, tmp_path):
    trainer = CrossEntropyTrainer(held_settings(num_candidates=4), tmp_path / "run")
    trainer.run()
    path = trainer.export()
    exported = resolve_policy(str(path))
    got = judged(trainer.scenario, trainer._validation, exported)
    np.testing.assert_allclose(got.scores, trainer.best_scores, rtol=1e-6)
    _, held = fates(trainer.scenario, trainer._validation, exported)
    assert held.any()
    manifest = read_manifest(path)
    assert (manifest.network.family, manifest.network.base) == ("dispatch-held-1", HELD_BASES[0])
    assert manifest.num_extra_actions == 1
    (path.parent / "weights.npz").unlink()
    graph = judged(trainer.scenario, trainer._validation[:1], resolve_policy(str(path)))
    np.testing.assert_allclose(graph.scores, got.scores[:1], rtol=1e-6)


def test_a_rule_that_holds_needs_a_scenario_that_lets_it(settings, tmp_path):
    with pytest.raises(ConfigError, match=r"small does not allow: add `actions: \{hold: true\}`"):
        CrossEntropyTrainer(settings(base=HELD), tmp_path / "run")


@pytest.mark.parametrize("learner", ["ppo", "counterfactual"])
def test_gradients_are_not_for_a_rule_that_holds(learner, tmp_path, held_settings):
    entry = find_trainer("dispatch", learner)
    network = NetworkConfig(base=HELD, extended=True)
    config = entry.settings(scenario=held_settings().scenario, network=network)
    with pytest.raises(ConfigError, match="added-delay-held is not learned from by gradients: ta"):
        entry.trainer(config, tmp_path / "run")


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
            "base must be one of added-delay, prefix-load, added-delay-inferred, "
            "added-delay-held, got 'mct'",
        ),
        ({"base": "prefix-load:eta=0"}, "weight, eta of base must be above 0, got 'prefix-load:et"),
        ({"base": "added-delay-inferred"}, "prefill, decode, displaced of base must be above 0"),
        ({"eta": 0.0}, "eta must be above 0, got 0"),
        ({"spread": 0.0}, "spread must be above 0, got 0"),
        ({"holds_only": True}, "holds_only is for a base that holds, added-delay-held, got"),
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
