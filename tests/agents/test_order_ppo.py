"""PPO on orders: what copies of an engine say of a choice, and that it learns from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from servegym.cli import _parse, main
from servegym.errors import ConfigError
from servegym.policy.learned_ordering import CLIP, MlpOrdering
from servegym.policy.ordering import IS_RUNNING
from servegym.serve.vllm.plugin import load_policy
from servegym.train.order_branches import Rules, collect
from servegym.train.order_ppo import OrderPPOTrainer
from servegym.train.order_ppo_settings import OrderPPOTraining
from servegym.train.registry import find_trainer

TIGHT = {
    "name": "tight",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}],
    "workload": {
        "kind": "generated",
        "rate_rps": 1.5,
        "prompt": {"medians_tokens": [200.0], "sigmas": [1.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "num_requests": 40,
}


@pytest.fixture
def tight(tmp_path):
    path = tmp_path / "tight.yaml"
    path.write_text(yaml.safe_dump(TIGHT))
    return str(path)


def settings(scenario, **changes):
    small = OrderPPOTraining(
        scenario=scenario,
        load=(0.8, 1.2),
        max_minutes=math.inf,
        max_updates=4,
        num_hidden=2,
        num_episodes=2,
        num_choices=4,
        num_threads=1,
        label_every=8,
        horizon_s=2.0,
        num_validation=4,
    )
    return replace(small, **changes)


def trained_away(trainer: OrderPPOTrainer) -> None:
    """Move the weights somewhere, the hidden units' too."""
    rng = np.random.default_rng(1)
    with torch.no_grad():
        trainer.theta += 0.4 * torch.from_numpy(rng.normal(size=len(trainer.theta)))


def test_scores_with_gradients_are_those_of_the_file(tight, tmp_path):
    trainer = OrderPPOTrainer(settings(tight), tmp_path / "run")
    trained_away(trainer)
    weights = trainer.space.weights(trainer.present)
    want = MlpOrdering(weights, information="predictive", name="").score(trainer.samples, None)
    logs = np.copysign(np.log1p(np.abs(trainer.samples)), trainer.samples)
    rows = np.clip((logs - weights.mean) / weights.scale, -CLIP, CLIP)
    with torch.no_grad():
        heads = trainer.space.scores(trainer.theta, torch.from_numpy(rows)).numpy()
    running = trainer.samples[:, IS_RUNNING] > 0
    assert running.any()
    assert not running.all()
    got = np.where(running, heads[:, 1], heads[:, 0])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("goodput", [False, True])
def test_the_policys_own_pick_leads_where_its_episode_does(tight, tmp_path, goodput):
    trainer = OrderPPOTrainer(settings(tight), tmp_path / "run")
    trained_away(trainer)
    # the linear score alone: units see the engine, too, which each pick of a step changes
    with torch.no_grad():
        trainer.theta[2 * len(trainer.space.linear) :] = 0.0
    episode = trainer._validation[1]
    # so cold that it draws whom it would pick, and copies play to the end of the episode
    rules = Rules(temperature=1e-9, label_every=2, horizon_s=math.inf, goodput=goodput)
    nets = trainer.space.perceptrons(trainer.present[None])
    found = collect(trainer.scenario.spec, episode, nets, rules, num_choices=3, seed=5)
    env = trainer._play(trainer.present[None], [episode]).state.env[0]
    want = env["good"] if goodput else -env["area"]
    assert len(found.values) > 5
    np.testing.assert_allclose(found.values[:, 0], want, rtol=1e-9)
    assert found.preempts.any()
    assert found.tried[:, :2].all()
    others = found.values[:, 1:][found.tried[:, 1:]]
    assert (others != want).any()


def test_a_horizon_ends_copies_early(tight, tmp_path):
    trainer = OrderPPOTrainer(settings(tight), tmp_path / "run")
    episode = trainer._validation[0]
    nets = trainer.space.perceptrons(trainer.present[None])
    whole = Rules(temperature=1e-9, label_every=4, horizon_s=math.inf, goodput=False)
    long, short = (
        collect(trainer.scenario.spec, episode, nets, rules, num_choices=2, seed=0).values[:, 0]
        for rules in (whole, whole._replace(horizon_s=0.0))
    )
    assert (short >= long).all()
    assert (short > long).sum() > 5  # whoever is yet to come has no time there


def test_it_learns_and_its_file_runs_in_the_plugin(tight, tmp_path):
    trainer = OrderPPOTrainer(settings(tight, max_updates=6), tmp_path / "run")
    found = trainer.run()
    assert found.base_loss == pytest.approx(trainer.validate_rule("srpt").scores.mean())
    assert found.loss < found.base_loss
    assert trainer.last["train/labels"] > 0
    policy = load_policy(str(trainer.export()))
    assert isinstance(policy, MlpOrdering)


class Killed(Exception):
    pass


def test_a_killed_run_ends_as_an_uninterrupted_one(tight, tmp_path, monkeypatch):
    config = settings(tight)
    whole = OrderPPOTrainer(config, tmp_path / "whole")
    whole.run()
    real, made = OrderPPOTrainer._collect, []

    def collected(self):
        made.append(1)
        if len(made) > 2:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(OrderPPOTrainer, "_collect", collected)
        with pytest.raises(Killed):
            OrderPPOTrainer(config, tmp_path / "parts").run()
    again = OrderPPOTrainer(config, tmp_path / "parts")
    again.run()
    assert again.num_updates_made == whole.num_updates_made == 4
    np.testing.assert_array_equal(again.present, whole.present)
    np.testing.assert_array_equal(again.best.numpy(), whole.best.numpy())


def test_it_is_named_on_the_command_line(tight, tmp_path, capsys):
    words = ["--scenario", "kv-starved", "--learner", "ppo", "--num-choices", "5"]
    command = _parse(["train", *words])
    assert isinstance(command.settings, OrderPPOTraining)
    assert command.settings.num_choices == 5
    assert find_trainer("order").folder == "order"
    with pytest.raises(SystemExit):
        main(["train", *words[:4], "--help"])
    shown = capsys.readouterr().out.replace(",", " ")
    fields = {f.name for f in dataclasses.fields(OrderPPOTraining)} - {"learner"}
    assert len(fields) > 10
    for name in fields:
        assert f"--{'minutes' if name == 'max_minutes' else name.replace('_', '-')} " in shown
    out = ["--out", str(tmp_path / "run")]
    short = ["--max-updates", "1", "--num-episodes", "1", "--num-validation", "2"]
    main(["train", "--scenario", tight, "--learner", "ppo", *short, *out])
    before = (tmp_path / "run" / "ordering.npz").read_bytes()
    main(["export", "--run-folder", str(tmp_path / "run")])
    assert (tmp_path / "run" / "ordering.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"load": (1.0, 0.5)}, r"load must be two ascending numbers above 0, got \(1.0, 0.5\)"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"horizon_s": -1.0}, "horizon_s must be at least 0, got -1"),
        ({"label_every": 0}, "label_every must be at least 1, got 0"),
        ({"num_choices": 1}, "num_choices must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(setting, said):
    with pytest.raises(ConfigError, match=said):
        OrderPPOTraining(**setting)
