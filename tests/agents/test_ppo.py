"""The trainer: its arithmetic against slow loops and hand numbers, resuming, and learning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.policy.run import run
from servegym.scenario import load_scenario
from servegym.train import network_run, ppo
from servegym.train.ppo import PPOConfig, Trainer
from servegym.train.returns import RunningScale, chosen, gae, less_group_mean
from servegym.train.validation import FIRST_SEED, Validated, Validation

UPDATE = 4 * 16  # decisions of one update of the tiny runs


@pytest.fixture
def short_validation(monkeypatch):
    """Validate on two short episodes; the tiny runs are not about it."""
    monkeypatch.setattr(ppo, "_VALIDATION", (2, 40))


@pytest.fixture
def tiny(write_scenario, short_validation):
    """Return a maker of settings for runs of 64 decisions an update."""
    path = write_scenario()

    def make(updates: int, **settings) -> PPOConfig:
        defaults = {
            "scenario": path,
            "total_decisions": updates * UPDATE,
            "num_envs": 4,
            "group_size": 2,
            "num_steps": 16,
            "num_requests": 40,
            "minibatch": 32,
            "epochs": 2,
            "learning_rate": 5e-4,
            "warmup_updates": 0,
        }
        return PPOConfig(**{**defaults, **settings})

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.network.state_dict().items()}


def saved(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights that training goes on with; the trainer itself ends with the best ones."""
    return torch.load(trainer.folder.path / "checkpoint.pt", weights_only=True)["network"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_gae_equals_a_sum_over_all_later_steps():
    rng = np.random.default_rng(0)
    steps, envs = 12, 3
    reward, value = rng.normal(size=(2, steps, envs))
    gamma, lam = rng.uniform(0.5, 1.0, (2, steps, envs))
    gamma[4, 1] = gamma[7, 2] = gamma[11, 0] = 0.0  # episodes end there
    last = rng.normal(size=envs)
    want = np.zeros((steps, envs))
    for e in range(envs):
        for t in range(steps):
            factor = 1.0
            for k in range(t, steps):
                following = value[k + 1, e] if k + 1 < steps else last[e]
                want[t, e] += factor * (reward[k, e] + gamma[k, e] * following - value[k, e])
                factor *= gamma[k, e] * lam[k, e]
    got = gae(*(torch.from_numpy(x) for x in (reward, value, gamma, last, lam)))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


def test_gae_of_two_steps_by_hand():
    column = lambda *values: torch.tensor(values, dtype=torch.float64).unsqueeze(1)  # noqa: E731
    got = gae(column(1, 2), column(3, 5), column(0.5, 0.8), torch.tensor([10.0]), column(0.5, 0.9))
    # second: 2 + 0.8 * 10 - 5 = 5; first: 1 + 0.5 * 5 - 3 = 0.5, plus 0.5 * 0.5 * 5 = 1.25
    assert got.flatten().tolist() == [1.75, 5.0]


def test_group_mean_leaves_oneself_out():
    advantage = torch.tensor([[1.0, 2.0, 6.0, 10.0, 10.0, 40.0]])
    # 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2; 10 - (10+40)/2, the same, 40 - (10+10)/2
    want = [[-3.0, -1.5, 4.5, -15.0, -15.0, 30.0]]
    assert less_group_mean(advantage, 3).tolist() == want
    assert less_group_mean(advantage, 1) is advantage


def test_group_mean_of_one_environment_does_not_depend_on_its_own_advantage():
    # so it is a baseline: it shifts the gradient's mean by nothing
    a = torch.tensor([[5.0, 1.0], [7.0, 1.0]])
    subtracted = a - less_group_mean(a, 2)
    assert subtracted.tolist() == [[1.0, 5.0], [1.0, 7.0]]


def test_rewards_are_divided_by_the_deviation_of_discounted_returns():
    scale = RunningScale(2, horizon_s=10.0)
    no, half_life = np.zeros(2, bool), np.full(2, 10.0 * math.log(2.0))
    # returns 1 and 3: mean 2, mean square 5, deviation 1
    np.testing.assert_allclose(scale(np.array([1.0, 3.0]), np.zeros(2), no), [1.0, 3.0])
    # halved and 1 added: 1.5 and 2.5; of all four the mean is 2, the mean square 18.5 / 4
    got = scale(np.ones(2), half_life, np.array([True, False]))
    np.testing.assert_allclose(got, 1.0 / math.sqrt(18.5 / 4 - 4.0))
    # the first return was ended: now 0 + 1 and 2.5 + 1 without discount
    scale(np.ones(2), np.zeros(2), no)
    assert scale.mean == pytest.approx((8.0 + 4.5) / 6)
    assert scale.square == pytest.approx((18.5 + 1.0 + 12.25) / 6)
    assert scale.count == 6


def test_scale_keeps_rewards_that_never_vary_finite():
    scale = RunningScale(2, 10.0)
    assert np.isfinite(scale(np.zeros(2), np.zeros(2), np.zeros(2, bool))).all()


def test_chosen_picks_each_rows_action():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert chosen(values, torch.tensor([1, 0])).tolist() == [2.0, 3.0]


def test_equal_seeds_give_equal_weights_and_others_do_not(tiny, tmp_path):
    def trained(name: str, seed: int) -> dict[str, torch.Tensor]:
        trainer = Trainer(tiny(3, seed=seed), tmp_path / name)
        trainer.run()
        return saved(trainer)

    first = trained("a", 0)
    assert equal(first, trained("b", 0))
    assert not equal(first, trained("c", 1))


def test_run_leaves_config_checkpoint_and_log(tiny, tmp_path):
    trainer = Trainer(tiny(2), tmp_path)
    before = weights(trainer)
    trainer.run()
    assert not equal(before, saved(trainer))
    assert len(trainer.history) == 2
    assert trainer.history[0]["train/learning_rate"] == 5e-4
    assert trainer.history[1]["train/learning_rate"] == pytest.approx(2.5e-4)  # half is over
    assert all(math.isfinite(x) for stats in trainer.history for x in stats.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"]["num_steps"] == 16
    assert config["settings"]["network"]["base"] == "added-delay"
    assert config["scenario"]["workload"]["rate_rps"]
    assert config["versions"]["servegym"]
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "checkpoint.part").exists()


def test_warmup_trains_the_critic_alone(tiny, tmp_path):
    trainer = Trainer(tiny(2, warmup_updates=2), tmp_path)
    before = weights(trainer)
    trainer.run()
    after = saved(trainer)
    changed = {k.partition(".")[0] for k in after if not torch.equal(after[k], before[k])}
    assert changed == {"critic", "value"}


def test_finished_run_with_the_same_configuration_trains_no_further(tiny, tmp_path):
    first = Trainer(tiny(2), tmp_path)
    assert not first.finished
    first.run()
    learned, content = saved(first), (tmp_path / "checkpoint.pt").read_bytes()
    second = Trainer(tiny(2), tmp_path)
    second.run()
    assert second.finished
    assert second.update == 2
    assert second.history == []
    assert equal(weights(second), weights(first))
    assert equal(saved(second), learned)
    assert second.last == first.last
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


def test_run_returns_the_network_that_validated_best(tiny, tmp_path, monkeypatch):
    class Scripted:
        """Likes the network after the second update best."""

        def __init__(self, scenario, *, loads, num_episodes, num_requests):
            assert (num_episodes, num_requests) == (2, 40)
            assert loads == pytest.approx([0.6, 0.6 + 0.5 / 3, 0.6 + 1.0 / 3, 1.1])
            self.scripted = iter([1.0, 0.9, 0.7, 0.8, 0.95])

        def play(self, policy):
            if not isinstance(policy, TorchPolicy):  # a rule, drawn beside the run
                return Validated(np.full(3, 9.0), 9.0, 9.0)
            return Validated(np.full(3, next(self.scripted)), 1.0, 1.0)

    monkeypatch.setattr(network_run, "Validation", Scripted)
    seen = []
    real = Trainer._learn

    def learn(self, *arguments):
        stats = real(self, *arguments)
        seen.append(weights(self))
        return stats

    monkeypatch.setattr(Trainer, "_learn", learn)
    trainer = Trainer(tiny(3, validate_every=1), tmp_path)
    trainer.run()
    assert len(seen) == 3
    assert equal(weights(trainer), seen[1])
    assert equal(saved(trainer), seen[2])


def test_validation_scores_are_logarithms_of_mean_latency(write_scenario):
    scenario = load_scenario(write_scenario())
    validation = Validation(scenario, loads=[0.5, 1.0], num_episodes=4, num_requests=40)
    network = DispatchNetwork(NetworkConfig(base="speed-family", base_params=(1.0,)))
    scores = validation.play(TorchPolicy(network)).scores
    episodes = [
        scenario.episode(FIRST_SEED + i, load=(0.5, 1.0)[i % 2], num_requests=40) for i in range(4)
    ]
    simulator = Simulator(scenario.spec, episodes)
    run(simulator, policy("speed-family"))
    for i in range(4):
        fate = simulator.outcomes(i)
        assert scores[i] == pytest.approx(np.log((fate["finish_s"] - fate["arrival_s"]).mean()))
    again = validation.play(TorchPolicy(network))
    np.testing.assert_array_equal(again.scores, scores)


@pytest.mark.parametrize("killed_at", [3, 13])
def test_interrupted_run_ends_as_an_uninterrupted_one(tiny, tmp_path, monkeypatch, killed_at):
    class Killed(Exception):
        pass

    def learn(self, *arguments):
        if self.update == killed_at:
            raise Killed
        return real(self, *arguments)

    whole = Trainer(tiny(14), tmp_path / "whole")
    whole.run()
    real = Trainer._learn
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_learn", learn)
        with pytest.raises(Killed):
            Trainer(tiny(14), tmp_path / "parts").run()
    again = Trainer(tiny(14), tmp_path / "parts")
    again.run()
    assert again.update == 14
    # checkpoints are written every 10 updates; episodes of 40 decisions were left in their middle
    assert len(again.history) == (4 if killed_at == 13 else 14)
    assert equal(saved(again), saved(whole))
    assert equal(weights(again), weights(whole))
    for name in ("mean", "square", "count"):
        assert getattr(again.scale, name) == getattr(whole.scale, name)
    np.testing.assert_array_equal(again.scale.returns, whole.scale.returns)
    here, there = again.arenas[0].places, whole.arenas[0].places
    np.testing.assert_array_equal(here.episodes, there.episodes)
    assert here.episodes.min() > 1
    for got, want in zip(here.taken(), there.taken(), strict=True):
        np.testing.assert_array_equal(got, want)
    assert again.history[-1]["train/value_loss"] == whole.history[-1]["train/value_loss"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 5}, r"\(seed is 0 there, 5 here\)"),
        ({"load": (0.5, 0.7)}, r"load is \[0.6, 1.1\] there, \[0.5, 0.7\] here"),
        ({"total_decisions": 2 * UPDATE}, "total_decisions is 64 there, 128 here"),
        ({"max_minutes": 1.0}, 'max_minutes is "inf" there, 1.0 here'),
        ({"clip": 0.1, "epochs": 1}, "epochs is 2 there, 1 here; clip is 0.2 there, 0.1 here"),
        ({"network": NetworkConfig(hidden=16)}, "network.hidden is 32 there, 16 here"),
        ({"network": NetworkConfig(context="attention")}, "network.context"),
        ({"network": NetworkConfig(base="least-outstanding", base_params=())}, "network.base"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_any_other_setting_is_refused_by_name_and_nothing_is_touched(tiny, tmp_path, other, named):
    Trainer(tiny(1), tmp_path).run()
    before = {n: (tmp_path / n).read_bytes() for n in ("checkpoint.pt", "config.json")}
    with pytest.raises(ConfigError, match=rf"{named}.*: give another --out"):
        Trainer(tiny(1, **other), tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


def test_scenario_that_has_changed_is_refused_under_the_same_name(tiny, tmp_path):
    config = tiny(1)
    Trainer(config, tmp_path).run()
    path = Path(config.scenario)
    path.write_text(path.read_text().replace("num_requests: 40", "num_requests: 41"))
    with pytest.raises(ConfigError, match=r"scenario\.num_requests is 40 there, 41 here"):
        Trainer(config, tmp_path)


def test_other_version_is_refused(tiny, tmp_path, monkeypatch):
    Trainer(tiny(1), tmp_path).run()
    monkeypatch.setattr("servegym.__version__", "9.9.9")
    with pytest.raises(ConfigError, match=r'versions\.servegym is ".*" there, "9.9.9" here'):
        Trainer(tiny(1), tmp_path)


@pytest.mark.parametrize("key", ["network", "optimizer", "best", "returns", "taken", "rng", "last"])
def test_checkpoint_without_a_key_is_refused_in_one_sentence(tiny, tmp_path, key):
    Trainer(tiny(1), tmp_path).run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del content[key]
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match=rf"checkpoint\.pt lacks '{key}': delete it"):
        Trainer(tiny(1), tmp_path).run()


def test_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        Trainer(tiny(1, seed=seed), tmp_path / name).run()
    (tmp_path / "a" / "checkpoint.pt").write_bytes((tmp_path / "b" / "checkpoint.pt").read_bytes())
    with pytest.raises(ConfigError, match=r"was not made by the run that config\.json"):
        Trainer(tiny(1), tmp_path / "a").run()


def test_truncated_checkpoint_is_refused_in_one_sentence(tiny, tmp_path):
    Trainer(tiny(1), tmp_path).run()
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "checkpoint.pt").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"checkpoint\.pt is broken: delete it"):
            Trainer(tiny(1), tmp_path).run()


@pytest.mark.parametrize("content", [b"", b"no checkpoint"])
def test_broken_files_are_refused_in_one_sentence(tiny, tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"is no training run: it has no config\.json"):
        Trainer(tiny(1), tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json is broken"):
        Trainer(tiny(1), tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_envs": 5}, r"num_envs \(5\) must be a multiple of group_size \(2\)"),
        (
            {"label_every": 5, "advantage": "counterfactual"},
            r"num_steps \(16\) must be a multiple of label_every \(5\)",
        ),
        ({"total_decisions": 63}, "total_decisions must be at least .* = 64, got 63"),
    ],
)
def test_wrong_setting_is_refused(tiny, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        tiny(1, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_refused(tiny):
    with pytest.raises(ConfigError, match="use cpu"):
        tiny(1, device="cuda")


def test_scenario_with_holds_and_rejections_trains(tiny, tmp_path, write_scenario):
    path = write_scenario(actions={"hold": True, "reject": True, "hold_s": 0.05})
    config = tiny(2, scenario=path, network=NetworkConfig(num_extra=2))
    trainer = Trainer(config, tmp_path)
    trainer.run()
    assert trainer.update == 2


def mean_e2e_s(path: str, policy, num_seeds: int = 6) -> float:
    scenario = load_scenario(path)
    simulator = Simulator(scenario.spec, [scenario.episode(9000 + i) for i in range(num_seeds)])
    run(simulator, policy)
    fates = np.concatenate([simulator.outcomes(e) for e in range(num_seeds)])
    return float(np.mean(fates["finish_s"] - fates["arrival_s"]))


@pytest.mark.slow
def test_learning_overcomes_a_bad_base(write_scenario, tmp_path: Path):
    # least outstanding treats a replica of a tenth of the speed like the other one
    path = write_scenario(
        fleet=[{"gpu": "A100-SXM-80GB", "speed": 1.0}, {"gpu": "A100-SXM-80GB", "speed": 0.1}],
        workload={
            "kind": "generated",
            "rate_rps": 10.0,
            "prompt": {"medians_tokens": [200.0], "sigmas": [0.3], "max_tokens": 1000},
            "output": {"medians_tokens": [50.0], "sigmas": [0.3], "max_tokens": 200},
        },
        num_requests=256,
    )
    config = PPOConfig(
        scenario=path,
        total_decisions=60_000,
        num_envs=16,
        num_steps=125,
        num_requests=256,
        load=(1.0, 1.0),
        warmup_updates=2,
        learning_rate=2e-3,
        network=NetworkConfig(base="least-outstanding", base_params=(), eta=0.5),
    )
    trainer = Trainer(config, tmp_path)
    before_s = mean_e2e_s(path, TorchPolicy(trainer.network))
    after_s = mean_e2e_s(path, TorchPolicy(trainer.run()))
    assert before_s == pytest.approx(mean_e2e_s(path, policy("least-outstanding")))
    # sending everything to the fast one halves the mean; a third is the margin asked for
    assert mean_e2e_s(path, policy("speed-family:eta=2")) < 0.5 * before_s
    assert after_s < 0.67 * before_s


def test_it_learns_from_what_all_choices_would_have_done(write_scenario, tmp_path, monkeypatch):
    # an H100 and two L40S: who counts requests alone sends too many to the slow ones
    monkeypatch.setattr(ppo, "_VALIDATION", (4, 300))
    config = PPOConfig(
        scenario=write_scenario(),
        total_decisions=8 * 16 * 64,
        num_envs=16,
        group_size=1,
        num_steps=64,
        num_requests=300,
        load=(0.8, 1.2),
        advantage="counterfactual",
        label_every=2,
        minibatch=128,
        learning_rate=3e-3,
        network=NetworkConfig(base="least-outstanding", eta=1.0),
    )
    trainer = Trainer(config, tmp_path)
    first = {k: v.clone() for k, v in trainer.network.critic.state_dict().items()}
    trainer.run()
    assert trainer.gain > 0.03
    assert equal(first, trainer.network.critic.state_dict())  # nobody asks it
    with pytest.raises(ConfigError, match="some of pd-equal only prefill or decode: take --adv"):
        Trainer(PPOConfig(scenario="pd-equal", advantage="counterfactual"), tmp_path / "other")
