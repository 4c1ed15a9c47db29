"""All agents of a fleet trained at once by PPO: who follows whom, how they begin and learn."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from servegym.cli import main
from servegym.envs.agent_batch import AgentBatch
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_dispatch
from servegym.policy.learned_ordering import MlpOrdering
from servegym.train.fleet_rollout import Drawn, roll_out
from servegym.train.mappo import MappoTrainer
from servegym.train.mappo_settings import MappoTraining
from servegym.train.pair_run import DISPATCHER, SCHEDULERS
from servegym.train.request_run import losses
from servegym.train.returns import gae, gae_along

from .test_joint_training import FLEET, played, same_fate

START = "min-kv+footprint:weight=3.293,victim_weight=-1.81"


@pytest.fixture
def fleet(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(FLEET))
    return str(path)


def settings(scenario, **changes):
    small = MappoTraining(
        scenario=scenario,
        start=START,
        load=(0.8, 1.2),
        max_minutes=math.inf,
        max_updates=4,
        num_hidden=2,
        num_episodes=3,
        num_requests=40,
        num_minibatches=2,
        warmup_updates=1,
        num_validation=4,
    )
    return replace(small, **changes)


def test_an_advantage_along_links_by_hand():
    """One agent decides at steps 0 and 3, another at 1; the third step is nobody's."""
    column = lambda *values: torch.tensor(values, dtype=torch.float64).unsqueeze(1)  # noqa: E731
    reward, value = column(1, 4, 0, 2), column(3, 1, 0, 5)
    gamma, lam = column(0.5, 0, 0, 0), column(0.5, 1, 1, 1)
    following = torch.tensor([[3], [0], [0], [0]])
    # at 3: 2 - 5; at 1: 4 - 1; at 0: 1 + 0.5 * 5 - 3 = 0.5, plus 0.5 * 0.5 * -3
    got = gae_along(reward, value, gamma, lam, following)
    assert got.flatten().tolist() == [-0.25, 3.0, 0.0, -3.0]


def test_where_the_next_step_follows_it_is_gae():
    reward, value = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    gamma, lam = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(1))
    gamma[4, 1] = 0.0
    gamma[6] = 0.0
    following = torch.arange(1, 8).unsqueeze(1).expand(7, 3).clamp(max=6)
    want = gae(reward, value, gamma, torch.zeros(3), lam)
    torch.testing.assert_close(gae_along(reward, value, gamma, lam, following), want)


def test_what_follows_a_decision_is_the_fleets_next_or_the_agents_own(fleet):
    fleets = AgentBatch(3, fleet, num_requests=1)
    episodes = [
        fleets.batch.scenario.episode(seed, num_requests=n) for seed, n in enumerate((30, 12, 50))
    ]
    who: list[list[int]] = [[], [], []]

    def draw(kind, asked):
        for row, agent in zip(asked.fleet.tolist(), asked.agent.tolist(), strict=True):
            who[row].append(agent)
        return Drawn(asked.action_mask.argmax(1), asked.agent)

    found = roll_out(fleets, episodes, draw)
    assert {len(row) for row in who} != {len(who[2])}  # they end at different steps
    for e, agents in enumerate(who):
        last = len(agents) - 1
        of_fleet, of_agent = found.of_fleet, found.of_agent
        assert np.flatnonzero(~of_fleet.ends[:, e]).tolist() == list(range(last))
        assert of_fleet.following[:last, e].tolist() == list(range(1, last + 1))
        assert of_fleet.reward[:, e].sum() == pytest.approx(found.returns[e])
        for t, agent in enumerate(agents):
            later = [u for u in range(t + 1, last + 1) if agents[u] == agent]
            assert of_agent.ends[t, e] == (not later)
            until = later[0] if later else last + 1
            if later:
                assert of_agent.following[t, e] == until
            # what it earns, and how long that takes, is all that is in between
            want = of_fleet.reward[t:until, e].sum(), of_fleet.dt_s[t:until, e].sum()
            assert (of_agent.reward[t, e], of_agent.dt_s[t, e]) == pytest.approx(want)
    for kind, steps in found.step.items():
        kept = np.concatenate(found.kept[kind])
        want = [who[e][t] for t, e in zip(steps.tolist(), found.fleet[kind].tolist(), strict=True)]
        assert kept.tolist() == want
        assert len(want) > 20


def test_scores_with_gradients_are_those_of_what_is_exported(fleet, tmp_path):
    trainer = MappoTrainer(settings(fleet, start="added-delay:prefill=0.3,decode=2+srpt"), tmp_path)
    rng = np.random.default_rng(0)
    order, dispatch = (
        theta.detach() + 0.3 * torch.from_numpy(rng.normal(size=len(theta))).float()
        for theta in trainer.agents.thetas
    )
    rows = trainer.rows[:200]
    policy = MlpOrdering(
        trainer.order_space.weights(order.double().numpy()), information="predictive", name="order"
    )
    inputs, logs = trainer.order_space.prepared(torch.from_numpy(rows).float())
    heads = trainer.order_space.scores(order, inputs, logs).numpy()
    runs = rows[:, 0] > 0
    assert 0 < runs.sum() < 200
    got = np.where(runs, heads[:, 1], heads[:, 0])
    np.testing.assert_allclose(got, policy.score(rows, np.zeros((200, 0))), rtol=1e-3, atol=1e-3)
    pair = resolve_dispatch(START)
    (replicas, request, mask), _ = trainer._sample(pair, rng)
    network = trainer.dispatch_space.network(dispatch.double().numpy())
    seen = [torch.from_numpy(x[:100]) for x in (replicas, request, mask)]
    want = network(seen[0], seen[1], seen[2].float()).detach()[:, :3]
    got = trainer.dispatch_space.scores(dispatch, *trainer.dispatch_space.prepared(*seen[:2]))
    allowed = seen[2][:, :3] > 0
    apart = (got - want)[allowed.all(1)]
    assert len(apart) > 50
    torch.testing.assert_close(apart, apart[:, :1].expand(-1, 3), rtol=1e-3, atol=1e-3)
    assert (want.argmax(1) != 0).any()


@pytest.mark.parametrize("order", ["fcfs", "footprint:weight=3.293,victim_weight=-1.81"])
def test_agents_that_draw_next_to_greedily_wait_as_long_as_the_pair_of_rules(
    fleet, tmp_path, order
):
    start = f"added-delay:decode=2+{order}"  # whose costs are hardly ever the same: ties are drawn
    config = settings(fleet, start=start, temperature=1e-9, shaping=False)
    trainer = MappoTrainer(config, tmp_path / "run")
    episodes = trainer.episodes(7, 3, 60)
    want = played(trainer.scenario, resolve_dispatch(start), episodes)
    drawn = roll_out(trainer.fleets, episodes, trainer.agents.draw)
    # scores that are next to the same are apart in 64 bits and not in 32: some choices differ
    np.testing.assert_allclose(-drawn.returns, want.state.env["area"], rtol=2e-3)
    another = "added-delay:decode=2+" + ("srpt" if order == "fcfs" else "fcfs")
    other = played(trainer.scenario, resolve_dispatch(another), episodes)
    assert (np.abs(other.state.env["area"] / want.state.env["area"] - 1.0) > 0.01).all()
    assert want.state.request["num_preemptions"].sum() > 20


def test_what_validates_and_is_exported_begins_as_the_pair_of_rules(fleet, tmp_path):
    trainer = MappoTrainer(settings(fleet), tmp_path / "run")
    pair = resolve_dispatch(START)
    trainer.best = trainer.parameters()
    trainer.best_scores = trainer.first_scores = trainer.validate().scores
    want = played(trainer.scenario, pair, trainer._validation)
    np.testing.assert_allclose(trainer.best_scores, losses(trainer.scenario, want), rtol=1e-9)
    trainer.export(tmp_path / "kept")
    kept = played(trainer.scenario, resolve_dispatch(str(tmp_path / "kept")), trainer._validation)
    same_fate(kept, want, 4)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["central", "own"])
def test_what_it_finds_is_what_both_parts_play(fleet, tmp_path, critic):
    config = settings(fleet, critic=critic, start="least-outstanding+fcfs", max_updates=10)
    trainer = MappoTrainer(config, tmp_path / "run")
    found = trainer.run()
    if critic == "central":  # by the same few decisions a critic of each class learns less
        assert found.loss < 0.98 * found.first_loss
    explained = [stats["train/explained_variance"] for stats in trainer.history]
    assert max(explained) > 0.2 > explained[0]
    assert "train/policy_loss" not in trainer.history[0]  # the critic alone
    assert trainer.history[-1]["train/policy_loss"] < 0.0
    trainer.export()
    kept = played(trainer.scenario, resolve_dispatch(str(tmp_path / "run")), trainer._validation)
    assert losses(trainer.scenario, kept).mean() == pytest.approx(found.loss, rel=1e-6)


class Killed(Exception):
    pass


def test_a_killed_run_ends_as_an_uninterrupted_one(fleet, tmp_path, monkeypatch):
    config = settings(fleet, num_requests=20, num_episodes=2)
    whole = MappoTrainer(config, tmp_path / "whole")
    whole.run()
    real = MappoTrainer.improve

    def improve(self):
        if self.num_updates_made == 2:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(MappoTrainer, "improve", improve)
        with pytest.raises(Killed):
            MappoTrainer(config, tmp_path / "parts").run()
    again = MappoTrainer(config, tmp_path / "parts")
    again.run()
    assert again.num_updates_made == whole.num_updates_made == 4
    assert len(again.history) == 2
    for part in (SCHEDULERS, DISPATCHER):
        assert not torch.equal(
            whole.agents.thetas[part], MappoTrainer(config, tmp_path / "new").agents.thetas[part]
        )
        torch.testing.assert_close(
            again.agents.thetas[part], whole.agents.thetas[part], rtol=0.0, atol=0.0
        )
    np.testing.assert_array_equal(again.best_scores, whole.best_scores)


def test_the_command_names_its_critic_and_refuses_what_cannot_be(fleet, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--scenario", "kv-starved-fleet", "--learner", "mappo", "--help"])
    shown = capsys.readouterr().out.replace(",", " ")
    fields = {f.name for f in dataclasses.fields(MappoTraining)} - {"learner", "scenario"}
    assert len(fields) > 15
    for name in fields:
        assert f"--{'minutes' if name == 'max_minutes' else name.replace('_', '-')} " in shown
    assert "--critic {central own}" in shown
    for changes, message in (
        ({"start": ""}, r"start must be a pair of rules, DISPATCH\+ORDER, as which agents begin"),
        ({"critic": "team"}, "critic must be central or own, got 'team'"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0"),
        ({"num_minibatches": 0}, "num_minibatches must be at least 1, got 0"),
        ({"entropy": -1.0}, "entropy must be at least 0, got -1"),
        ({"warmup_updates": -1}, "warmup_updates must be at least 0, got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            MappoTraining(**changes)
    with pytest.raises(ConfigError, match="mixed-chat must have two replicas or more, all with"):
        MappoTrainer(MappoTraining(scenario="mixed-chat"), tmp_path)
    with pytest.raises(ConfigError, match=r"start must be DISPATCH.ORDER of rules that"):
        MappoTrainer(settings(fleet, start="round-robin+srpt"), tmp_path)
    link = {"gb_per_s": 5.0}
    moving = [{**entry, "link": link} for entry in FLEET["fleet"]]
    path = tmp_path / "moving.yaml"
    path.write_text(yaml.safe_dump({**FLEET, "fleet": moving, "migration": {"interval_s": 0.1}}))
    with pytest.raises(
        ConfigError, match="must have no migration and no roles for --learner mappo: it "
    ):
        MappoTrainer(settings(str(path)), tmp_path)
