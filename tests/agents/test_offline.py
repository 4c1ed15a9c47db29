"""Data sets equal the play that they hold; three algorithms learn from them, resume and export."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import servegym
from servegym.agents.network import DispatchNetwork, NetworkConfig
from servegym.baselines.registry import policy
from servegym.cli import main
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.export.manifest import read_manifest
from servegym.policy.contract import OUTSTANDING_REQUESTS, SCHEMA_VERSION
from servegym.policy.run import run
from servegym.train.offline_settings import OfflineTraining
from servegym.train.recording import EpisodeRecorder, record

minari = pytest.importorskip("minari", reason="the extra offline")
from servegym.train.dataset import DataSet  # noqa: E402
from servegym.train.offline import OfflineTrainer  # noqa: E402


@pytest.fixture(scope="module")
def scenario(write_scenario) -> str:
    return write_scenario()


@pytest.fixture(scope="module")
def recorded(scenario, tmp_path_factory):
    """Return the folder of a data set: half explored, of a rule that does not know speeds."""
    folder = tmp_path_factory.mktemp("data") / "some"
    references = {"random": policy("random"), "added-delay": policy("added-delay")}
    record(
        scenario,
        policy("least-outstanding"),
        folder,
        references,
        num_episodes=12,
        load=(0.8, 1.2),
        num_requests=150,
        first_seed=7,
        explored=0.5,
    )
    return folder


@pytest.fixture
def tiny(scenario, recorded):
    """Return a maker of settings for short runs on that data set."""

    def make(**settings) -> OfflineTraining:
        defaults = {
            "scenario": scenario,
            "dataset": str(recorded),
            "total_updates": 4,
            "num_batches": 3,
            "batch": 16,
            "validate_every": 2,
            "validation_episodes": 4,
            "validation_requests": 100,
        }
        return OfflineTraining(**{**defaults, **settings})

    return make


def saved(folder) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_what_is_read_back_is_what_was_played(recorded):
    dataset = minari.MinariDataset(recorded / "data")
    assert servegym.__version__  # the environments are registered
    env = dataset.recover_environment()
    seeds = [row["seed"] for row in dataset.storage.get_episode_metadata(range(12))]
    assert seeds == list(range(7, 19))
    likely = []
    for episode, seed in zip(dataset, seeds, strict=True):
        observation, info = env.reset(seed=seed)
        for step, action in enumerate(episode.actions):
            for name, value in observation.items():
                np.testing.assert_array_equal(episode.observations[name][step], value)
            observation, reward, terminated, _, info = env.step(action)
            assert episode.rewards[step] == reward
            assert episode.infos["dt_s"][step + 1] == info["dt_s"]
        assert terminated
        assert episode.terminations[-1]
        assert not episode.truncations.any()
        likely.append(episode.infos["propensity"][:-1])
    # one of three replicas is the rule's
    assert set(np.round(np.concatenate(likely), 6)) == {round(0.5 / 3, 6), round(0.5 + 0.5 / 3, 6)}
    metadata = json.loads((recorded / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == "servegym/some-v0"
    assert metadata["servegym"]["schema_version"] == SCHEMA_VERSION
    assert metadata["servegym"]["explored"] == 0.5


@pytest.mark.parametrize("rule", ["least-outstanding", "random", "added-delay-inferred"])
def test_a_recorded_rule_plays_as_it_is_judged(scenario, rule):
    recorder = EpisodeRecorder(scenario, num_requests=60)
    played = recorder.play(policy(rule), seed=3)
    episode = recorder.env.unwrapped.batch.simulator.episodes[0]
    simulator = Simulator(recorder.env.unwrapped.batch.scenario.spec, [episode])
    run(simulator, policy(rule), seed=3)
    done = simulator.outcomes()
    assert played.metrics["mean_e2e_s"] == (done["finish_s"] - done["arrival_s"]).mean()
    # the return is what all requests spent in the system
    assert -played.rewards.sum() == pytest.approx((done["finish_s"] - done["arrival_s"]).sum())


def test_scores_0_and_1_are_the_references_on_the_same_episodes(recorded, scenario):
    dataset = minari.MinariDataset(recorded / "data")
    recorder = EpisodeRecorder(scenario, num_requests=150, load=(0.8, 1.2))
    for rule, score in (("random", 0.0), ("added-delay", 1.0)):
        returns = [recorder.play(policy(rule), seed).rewards.sum() for seed in range(7, 19)]
        found = minari.get_normalized_score(dataset, np.array(returns)).mean()
        assert found == pytest.approx(score, abs=1e-9)
    own = [episode.rewards.sum() for episode in dataset]
    assert 0.0 < minari.get_normalized_score(dataset, np.array(own)).mean() < 1.0


@pytest.mark.parametrize("algorithm", ["cql", "iql"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tiny, tmp_path, monkeypatch, algorithm):
    class Killed(Exception):
        pass

    def improve(self):
        if self.update == 3:
            raise Killed
        return real(self)

    config = tiny(algorithm=algorithm)
    whole = OfflineTrainer(config, tmp_path / "whole")
    whole.run()
    real = OfflineTrainer.improve
    with monkeypatch.context() as patch:
        patch.setattr(OfflineTrainer, "improve", improve)
        with pytest.raises(Killed):
            OfflineTrainer(config, tmp_path / "parts").run()
    again = OfflineTrainer(config, tmp_path / "parts")
    again.run()
    assert len(again.history) == 2  # a checkpoint every 2 updates
    assert again.history[-1]["train/policy_loss"] == whole.history[-1]["train/policy_loss"]
    stored = [saved(tmp_path / name) for name in ("whole", "parts")]
    parts = ("network", "critic", "target")
    assert all(torch.equal(stored[0][p][k], stored[1][p][k]) for p in parts for k in stored[0][p])


def test_behaviour_cloning_learns_to_do_what_the_data_do(tiny, recorded, tmp_path):
    seen = DataSet(recorded).decisions()
    counts = np.where(seen.mask > 0, seen.replicas[:, :, OUTSTANDING_REQUESTS], np.inf)
    least, second = np.sort(counts)[:, :2].T
    clear = seen.decided & (least < second)  # which of equals is taken, no network can tell

    def share(network: DispatchNetwork) -> float:
        arrays = (torch.from_numpy(x[clear]) for x in seen[:3])
        with torch.no_grad():
            done = network(*arrays).argmax(-1).numpy()
        return (done == counts[clear].argmin(-1)).mean()

    network = NetworkConfig(base="added-delay", eta=1.0)
    settings = {"num_batches": 100, "batch": 256, "learning_rate": 3e-3}
    trainer = OfflineTrainer(tiny(algorithm="bc", network=network, **settings), tmp_path)
    assert share(trainer.network) < 0.7
    trainer.run()
    trainer.network.load_state_dict(saved(tmp_path)["network"])  # `run` leaves the best
    assert share(trainer.network) > 0.8
    assert trainer.num_decisions == seen.decided.sum()


@pytest.mark.parametrize("algorithm", ["cql", "iql"])
def test_values_are_learned_that_improve_on_what_the_data_do(tiny, tmp_path, algorithm):
    # it begins as the rule that was recorded, which sends too many to the slow replicas
    network = NetworkConfig(base="least-outstanding", eta=1.0)
    settings = {"num_batches": 60, "batch": 256, "learning_rate": 3e-3, "load": (0.8, 1.2)}
    settings |= {"total_updates": 6, "target_rate": 0.02, "horizon_s": 0.5, "conservatism": 0.05}
    trainer = OfflineTrainer(tiny(algorithm=algorithm, network=network, **settings), tmp_path)
    trainer.run()
    assert trainer.gain > 0.1


def test_action_values_differ_by_the_costs_of_the_rule(tiny, tmp_path, draw_observations):
    trainer = OfflineTrainer(tiny(network=NetworkConfig(base="added-delay", eta=10.0)), tmp_path)
    trainer.scale = 4.0
    rows = trainer.network.prepare(*draw_observations(50, 3))
    values = trainer.action_values(trainer.network, rows)
    logits = DispatchNetwork(trainer.config.network).logits(rows)
    allowed = rows.mask > 0
    both = allowed[:, 0] & allowed[:, 1]
    assert both.any()
    seconds = (logits[:, 0] - logits[:, 1]) / 10.0
    torch.testing.assert_close((values[:, 0] - values[:, 1])[both], seconds[both] / 4.0)
    assert (values[~allowed] < -1e7).all()


def test_the_commands_record_train_and_judge(scenario, tmp_path, monkeypatch, capsys):
    def command(text: str) -> str:
        name, *words = text.split()
        main([name, "--scenario", scenario, *words])
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    recording = "record --output data --episodes 2 --num-requests 30 --explored 0.2"
    said = command(f"{recording} --references added-delay")
    assert "2 episodes in data: mean return" in said
    command(
        "train --learner offline --dataset data --algorithm iql --updates 1 --num-batches 2"
        " --batch 8 --validation-episodes 2 --validation-requests 30"
    )
    file = "runs/offline-small/policy/policy.onnx"
    assert read_manifest(tmp_path / file).training["decisions"] == 16
    judged = command(f"evaluate --policies random {file} --loads 1 --seeds 2 --num-requests 30")
    assert "policy" in judged
    with pytest.raises(SystemExit):
        command(recording)
    assert "data holds a data set: give another --output" in capsys.readouterr().err


def test_data_of_other_decisions_are_refused(tiny, write_scenario, recorded, tmp_path):
    holds = write_scenario(actions={"hold": True})
    with pytest.raises(ConfigError, match="has 0 actions beside the replicas, and small 1"):
        OfflineTrainer(tiny(scenario=holds), tmp_path)
    with pytest.raises(ConfigError, match=r"is no data set .*: make one with servegym record"):
        OfflineTrainer(tiny(dataset=str(tmp_path)), tmp_path)
    with pytest.raises(ConfigError, match="offline learning needs --dataset"):
        OfflineTrainer(tiny(dataset=""), tmp_path)
    with pytest.raises(ConfigError, match="cannot record mct-oracle, an oracle"):
        record(tiny().scenario, policy("mct-oracle"), tmp_path, {}, num_episodes=1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"horizon_s": 0.0}, "horizon_s must be above 0, got 0"),
        ({"expectile": 1.5}, "expectile must be within 0 to 1, got 1.5"),
        ({"conservatism": -1.0}, "conservatism must be at least 0, got -1"),
        ({"algorithm": "dqn"}, "algorithm must be one of bc, cql, iql, got 'dqn'"),
    ],
)
def test_impossible_settings_are_refused(tiny, setting, said):
    with pytest.raises(ConfigError, match=said):
        tiny(**setting)
