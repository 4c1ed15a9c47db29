"""Scenarios that are trained on together: what a mix is, its labels, its run and its card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml

from servegym.agents.network_config import NetworkConfig
from servegym.cli import _parse, main
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_policy
from servegym.export.sample import together
from servegym.export.shipped import shipped_names, shipped_path
from servegym.policy.counterfactual import LIMITS, SECONDS
from servegym.policy.run import run
from servegym.scenario import load_scenario
from servegym.train.counterfactual import CounterfactualTrainer
from servegym.train.counterfactual_settings import CounterfactualTraining
from servegym.train.mix import is_mix, load_mix, mix_names
from servegym.train.validation import Validated


@pytest.fixture
def write_mix(write_scenario, tmp_path):
    """Return a writer of a mix of the small scenario, as it is and changed."""
    scenario = write_scenario()

    def write(*variants: dict) -> str:
        path = tmp_path / "mix.yaml"
        rows = [{"scenario": scenario, **variant} for variant in variants]
        path.write_text(yaml.safe_dump({"name": "small mix", "variants": rows}))
        return str(path)

    return write


LARGER = {"fleet": [{"gpu": "H100-SXM-80GB", "count": 2}, {"gpu": "L40S", "count": 4}]}
NOISY = {"disturbances": {"predictor": {"kind": "lognormal", "sigma": 1.0}}, "load": [1.0, 1.2]}


def tiny(mix: str, updates: int, **settings) -> CounterfactualTraining:
    """Make settings for runs of 16 labels of each scenario an update."""
    defaults = {
        "scenario": mix,
        "total_labels": updates * 48,
        "num_envs": 4,
        "num_steps": 16,
        "num_samples": 2,
        "num_requests": 40,
        "memory": 144,
        "num_batches": 4,
        "batch": 24,
        "validate_every": 2,
        "validation_episodes": 2,
        "validation_requests": 40,
        "network": NetworkConfig(extended=True, relative=True, base="added-delay-inferred"),
    }
    return CounterfactualTraining(**{**defaults, **settings})


def saved(trainer: CounterfactualTrainer) -> dict:
    return torch.load(trainer.folder.path / "checkpoint.pt", weights_only=True)


def test_another_fleet_gets_the_rate_that_it_can_bear_and_all_else_stays(write_mix):
    mix = load_mix(write_mix({}, LARGER, NOISY))
    plain, larger, noisy = mix.parts
    assert larger.scenario.workload.rate_rps == pytest.approx(2 * plain.scenario.workload.rate_rps)
    assert larger.scenario.max_replicas == 6
    assert larger.scenario.disturbances == plain.scenario.disturbances
    assert noisy.scenario.disturbances.predictor.sigma == 1.0
    assert noisy.scenario.fleet == plain.scenario.fleet
    assert (plain.load, noisy.load) == ((0.6, 1.1), (1.0, 1.2))


def test_a_scenario_has_its_own_prices_where_it_names_them(write_mix):
    plain, dear = load_mix(write_mix({}, {"prices": {"memory_price": 2.0}})).parts
    own = SECONDS._replace(prefill_price=0.5, memory_price=1.0)
    assert plain.prices.over(own) == own
    assert dear.prices.over(own) == own._replace(memory_price=2.0)
    limits = {"second_price": 0.02, "stretch": 1.2, "softness": 0.1}
    (strict,) = load_mix(write_mix({"prices": limits})).parts
    assert strict.prices.over(LIMITS) == LIMITS._replace(second=0.02, stretch=1.2, softness=0.1)


def test_bundled_mixes_can_be_played_and_span_what_they_say():
    assert mix_names() == ["generalist", "held-out", "limits"]
    sizes = [{p.scenario.max_replicas for p in load_mix(name).parts} for name in mix_names()]
    assert {2, 16} <= sizes[0]
    assert {32, 64} <= sizes[1]
    assert sizes[2] == {4, 8}
    limits = load_mix("limits")
    assert limits.actions.reject
    assert (limits.parts[0].load[0], max(p.load[1] for p in limits.parts)) == (0.85, 1.8)
    assert is_mix("generalist")
    assert not is_mix("mixed-chat")


def test_scenarios_of_other_objectives_do_not_mix(write_mix, write_scenario):
    other = write_scenario(objective="goodput")
    with pytest.raises(ConfigError, match="must have the same objective, and those of small and"):
        load_mix(write_mix({}, {"scenario": other}))


@pytest.mark.slow
def test_a_run_on_a_mix_goes_on_and_is_exported_with_a_card(write_mix, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def fit(self, *arguments):
        if self.update == 3:
            raise Killed
        return real(self, *arguments)

    mix = write_mix({}, LARGER, NOISY)
    whole = CounterfactualTrainer(tiny(mix, 4), tmp_path / "whole")
    whole.run()
    real = CounterfactualTrainer._fit
    with monkeypatch.context() as patch:
        patch.setattr(CounterfactualTrainer, "_fit", fit)
        with pytest.raises(Killed):
            CounterfactualTrainer(tiny(mix, 4), tmp_path / "parts").run()
    again = CounterfactualTrainer(tiny(mix, 4), tmp_path / "parts")
    again.run()
    one, other = saved(again), saved(whole)
    assert all(torch.equal(one["network"][k], other["network"][k]) for k in other["network"])
    assert [len(kept["kept"][0]) for kept in one["memory"]] == [48, 48, 48]
    assert [kept["kept"][-1].shape[1] for kept in one["memory"]] == [3, 6, 3]
    assert len(other["best_scores"]) == 3 * 2
    path = again.export()
    card = (path.parent / "card.md").read_text()
    assert "# small mix" in card
    assert "4 updates" in card
    assert card.count("| small |") == 3
    assert "2 H100-SXM-80GB, 4 L40S" in card
    main(["export", "--run-folder", str(tmp_path / "parts"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "card.md").read_text() == card
    assert (tmp_path / "out" / "policy.onnx").read_bytes() == path.read_bytes()


def test_a_run_ends_when_nothing_better_is_found(write_mix, tmp_path):
    mix = write_mix({}, LARGER, NOISY)
    idle = tiny(mix, 12, validate_every=1, patience=2, learning_rate=0.0)
    trainer = CounterfactualTrainer(idle, tmp_path / "run")
    trainer.run()
    assert trainer.finished
    assert 2 <= trainer.update < 12
    assert trainer.gain == 0.0


def test_seconds_of_several_scenarios_count_by_their_geometric_mean():
    parts = [Validated(np.log([1.0, 4.0]), 2.5, 3.0), Validated(np.log([2.0, 2.0]), 2.0, 12.0)]
    assert Validated.joined(parts[:1], in_time=False) is parts[0]
    found = Validated.joined(parts, in_time=False)
    assert (found.objective, found.p99_s) == (pytest.approx(2.0), pytest.approx(6.0))
    np.testing.assert_allclose(found.scores, np.log([1.0, 4.0, 2.0, 2.0]))


def test_observations_of_smaller_fleets_are_filled_up():
    def made(width: int) -> tuple[np.ndarray, ...]:
        ones = np.ones((1, width, 2), np.float32), np.ones((1, 3), np.float32)
        return *ones, np.ones((1, width + 1), np.float32)

    replicas, request, mask = together([made(1), made(3)])
    assert replicas[..., 0].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert request.shape == (2, 3)
    assert mask.tolist() == [[1, 0, 0, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"total_labels": 47}, "total_labels must be at least .* of 3 scenarios, 48, got 47"),
        ({"memory": 47}, "memory must hold the 48 labels of an update of 3 scenarios, got 47"),
    ],
)
def test_what_is_too_little_for_all_is_refused(write_mix, tmp_path, settings, said):
    config = tiny(write_mix({}, LARGER, NOISY), 1, **settings)
    with pytest.raises(ConfigError, match=said):
        CounterfactualTrainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_mix_has_its_learner_and_no_trace():
    assert isinstance(
        _parse(["train", "--scenario", "generalist"]).settings, CounterfactualTraining
    )
    with pytest.raises(ConfigError, match=r"generalist is a mix .*, got ppo: leave --learner out"):
        _parse(["train", "--scenario", "generalist", "--learner", "ppo"])
    with pytest.raises(ConfigError, match="--trace is for one scenario, and generalist is a mix"):
        _parse(["train", "--scenario", "generalist", "--trace", "x.csv"]).run()


@pytest.mark.parametrize("name", shipped_names())
def test_a_policy_that_comes_with_it_plays_fleets_of_any_size(name):
    path = shipped_path(name)
    assert path is not None
    assert (path.parent / "card.md").is_file()
    policy = resolve_policy(name)
    assert policy.name == name
    for scenario in ("azure-conv-fit", "homogeneous-light"):
        loaded = load_scenario(scenario)
        simulator = Simulator(loaded.spec, [loaded.episode(0, num_requests=120)])
        run(simulator, policy)
        assert np.isfinite(simulator.outcomes()["finish_s"]).all()
