"""Policy iteration on counterfactuals: its parts by hand, resuming, refusals, and learning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents.network import DispatchNetwork, NetworkConfig, Prepared
from servegym.agents.torch_policy import TorchPolicy
from servegym.cli import _parse, main
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError, ServeGymError
from servegym.export.manifest import read_manifest
from servegym.export.resolve import resolve_policy
from servegym.policy.contract import INFERRED
from servegym.policy.numpy_network import num_inputs
from servegym.policy.run import run
from servegym.train.counterfactual import CounterfactualTrainer, Memory, advantages
from servegym.train.counterfactual_settings import CounterfactualTraining
from servegym.train.registry import LEARNERS, TRAINERS, find_trainer, trainer_of
from servegym.train.run_folder import StoredRun


@pytest.fixture
def tiny(write_scenario):
    """Return a maker of settings for runs of 16 labels an update."""
    path = write_scenario()

    def make(updates: int, **settings) -> CounterfactualTraining:
        defaults = {
            "scenario": path,
            "total_labels": updates * 16,
            "num_envs": 4,
            "num_steps": 16,
            "num_samples": 2,
            "num_requests": 40,
            "memory": 48,
            "num_batches": 4,
            "batch": 8,
            "validate_every": 2,
            "validation_episodes": 2,
            "validation_requests": 40,
        }
        return CounterfactualTraining(**{**defaults, **settings})

    return make


def saved(trainer: CounterfactualTrainer) -> dict:
    return torch.load(trainer.folder.path / "checkpoint.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_advantages_are_above_the_mean_of_what_is_allowed():
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 7.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert advantages(values, mask).tolist() == [[-1.0, 1.0, 0.0], [-2.0, 0.0, 2.0]]


def rows(first: int, num: int) -> tuple[Prepared, torch.Tensor]:
    """Make labelled decisions that are told apart by their numbers."""
    number = torch.arange(first, first + num, dtype=torch.float32)
    pair = number.unsqueeze(-1).expand(-1, 2)
    return Prepared(pair.unsqueeze(-1), pair, pair, pair, pair[:, :0]), 10 * pair


def test_the_oldest_labels_make_room():
    memory = Memory(5)
    memory.add(*rows(0, 3))
    assert memory.content()[0].prior[:, 0].tolist() == [0, 1, 2]
    memory.add(*rows(3, 3))
    kept, advantage = memory.content()
    assert sorted(kept.prior[:, 0].tolist()) == [1, 2, 3, 4, 5]
    assert torch.equal(advantage, 10 * kept.prior)
    again = Memory(5)
    again.restore(memory.state())
    for one in (memory, again):
        one.add(*rows(6, 2))
    assert torch.equal(again.content()[1], memory.content()[1])
    assert sorted(again.content()[1][:, 0].tolist()) == [30, 40, 50, 60, 70]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tiny, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def fit(self, *arguments):
        if self.update == 5:
            raise Killed
        return real(self, *arguments)

    whole = CounterfactualTrainer(tiny(8), tmp_path / "whole")
    whole.run()
    real = CounterfactualTrainer._fit
    with monkeypatch.context() as patch:
        patch.setattr(CounterfactualTrainer, "_fit", fit)
        with pytest.raises(Killed):
            CounterfactualTrainer(tiny(8), tmp_path / "parts").run()
    again = CounterfactualTrainer(tiny(8), tmp_path / "parts")
    again.run()
    assert len(again.history) == 4  # a checkpoint every 2 updates
    assert same(saved(again)["network"], saved(whole)["network"])
    assert again.history[-1]["train/regret"] == whole.history[-1]["train/regret"]
    third = CounterfactualTrainer(tiny(8), tmp_path / "parts")
    third.run()
    assert third.finished
    assert third.history == []


def test_one_or_two_threads_label_alike_and_another_seed_does_not(tiny, tmp_path):
    def trained(name: str, **settings) -> dict[str, torch.Tensor]:
        trainer = CounterfactualTrainer(tiny(2, **settings), tmp_path / name)
        trainer.run()
        return saved(trainer)["network"]

    one = trained("one", label_threads=1)
    assert same(one, trained("two", label_threads=2))
    assert not same(one, trained("other", seed=1))


def test_it_improves_on_the_rule_that_it_begins_as(write_scenario, tmp_path):
    # an H100 and two L40S: who counts requests alone sends too many to the slow ones
    config = CounterfactualTraining(
        scenario=write_scenario(),
        total_labels=6 * 512,
        num_envs=16,
        num_steps=64,
        label_every=2,
        num_samples=2,
        num_requests=300,
        load=(0.8, 1.2),
        validate_every=3,
        validation_episodes=4,
        validation_requests=300,
        network=NetworkConfig(base="least-outstanding", eta=1.0),
    )
    trainer = CounterfactualTrainer(config, tmp_path)
    trainer.run()
    assert trainer.gain > 0.05
    assert trainer.history[-1]["train/regret"] < 0.5 * trainer.history[0]["train/regret"]


def test_its_run_is_logged_and_exported_as_any_other(tiny, tmp_path):
    trainer = CounterfactualTrainer(tiny(4), tmp_path / "run")
    network = trainer.run()
    trainer.export()
    log = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    log.Reload()
    names = set(log.Tags()["scalars"])
    assert {"rollout/return", "train/policy_loss", "train/regret", "validation/gain"} <= names
    assert {f"reference/{rule}" for rule in trainer.references} <= names
    stored = StoredRun.read(tmp_path / "run")
    assert trainer_of(stored) is LEARNERS["dispatch"]["counterfactual"]
    main(["export", "--run-folder", str(tmp_path / "run"), "--out", str(tmp_path / "again")])
    first, again = tmp_path / "run" / "policy" / "policy.onnx", tmp_path / "again" / "policy.onnx"
    assert first.read_bytes() == again.read_bytes()
    assert read_manifest(again).training["algorithm"] == "counterfactual"
    assert isinstance(network, DispatchNetwork)


def test_what_a_router_infers_is_learned_from_where_that_is_asked_for(tiny, tmp_path):
    trainer = CounterfactualTrainer(tiny(3, network=NetworkConfig(extended=True)), tmp_path)
    network = trainer.run()
    assert network.needs & INFERRED == INFERRED
    first = network.actor.own[0].weight
    assert first.shape[1] == num_inputs(extended=True) > num_inputs(extended=False)
    path = trainer.export()
    assert read_manifest(path).extended
    simulator = Simulator(trainer.scenario.spec, [trainer.scenario.episode(1)])
    run(simulator, resolve_policy(str(path)))
    again = Simulator(trainer.scenario.spec, [trainer.scenario.episode(1)])
    run(again, TorchPolicy(network))
    np.testing.assert_array_equal(simulator.outcomes()["finish_s"], again.outcomes()["finish_s"])


def test_a_folder_of_another_learner_is_refused(tiny, tmp_path):
    CounterfactualTrainer(tiny(1), tmp_path).run()
    ppo = TRAINERS["dispatch"]
    config = ppo.settings(scenario=tiny(1).scenario)
    with pytest.raises(ConfigError, match=r"another configuration .*: give another --out"):
        ppo.trainer(config, tmp_path)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"load": (1.0, 0.5)}, r"load must be two ascending numbers above 0, got \(1.0, 0.5\)"),
        ({"label_every": 3}, r"num_steps \(16\) must be a multiple of label_every \(3\)"),
        ({"memory": 15}, "memory must hold the 16 labels of an update, got 15"),
        ({"total_labels": 15}, "total_labels must be at least those of an update.* = 16, got 15"),
        ({"max_minutes": 0.0}, "max_minutes must be above 0, got 0"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(tiny, setting, said):
    with pytest.raises(ConfigError, match=said):
        tiny(1, **setting)


def test_a_learner_is_named_on_the_command_line():
    words = ["--scenario", "azure-conv-fit", "--learner", "counterfactual", "--num-samples", "3"]
    command = _parse(["train", *words, "--base", "added-delay:prefill=1.3", "--labels", "9000"])
    assert isinstance(command.settings, CounterfactualTraining)
    assert (command.settings.num_samples, command.settings.total_labels) == (3, 9000)
    assert isinstance(_parse(["train", "--learner=ppo"]).settings, TRAINERS["dispatch"].settings)


def test_every_setting_is_an_option(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--learner", "counterfactual", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out.replace(",", " ")
    renamed = {"total_labels": "labels", "max_minutes": "minutes"}
    fields = {f.name for f in dataclasses.fields(CounterfactualTraining)} - {"network", "learner"}
    assert len(fields) > 20
    for name in fields:
        assert f"--{renamed.get(name, name).replace('_', '-')} " in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--learner", "dqn"],
            "problem dispatch has no learner dqn: choose ppo or counterfactual or cross-entropy or",
        ),
        (["--num-samples", "3"], "--num-samples is an option of --learner counterfactual: name"),
        (["--learner", "counterfactual", "--clip", "0.1"], "--clip is an option of --learner ppo"),
        (
            ["--scenario", "kv-starved", "--num-samples", "3"],
            "--num-samples is for scenarios of dispatch, and kv-starved is one of order: leave it",
        ),
        (
            ["--scenario", "kv-starved", "--learner", "counterfactual"],
            "problem order has no learner counterfactual: choose search or ppo",
        ),
    ],
)
def test_what_another_learner_has_is_refused_by_name(words, said):
    with pytest.raises(ServeGymError, match=said):
        _parse(["train", *words])


def test_without_a_name_a_problem_has_its_first_learner():
    for problem, entry in TRAINERS.items():
        assert find_trainer(problem) is entry
    searches = ["cross-entropy", "search", "evolve", "joint"]
    dispatchers = ["ppo", "counterfactual", *searches, "mappo", "offline", "rllib"]
    assert list(LEARNERS["dispatch"]) == dispatchers
    assert np.isinf(TRAINERS["dispatch"].settings().max_minutes)


def test_it_learns_to_reject_where_limits_are_judged(write_scenario, tmp_path):
    # at four times the load few are in time under a rule that takes everybody
    config = CounterfactualTraining(
        scenario=write_scenario(
            objective="goodput",
            actions={"reject": True},
            slo_classes=[{"name": "only", "ttft_s": 0.2, "tpot_s": 0.05}],
        ),
        total_labels=6 * 512,
        num_envs=16,
        num_steps=64,
        label_every=2,
        num_samples=2,
        num_requests=400,
        load=(3.0, 5.0),
        validate_every=3,
        validation_episodes=4,
        validation_requests=400,
        network=NetworkConfig(eta=1.0),
    )
    trainer = CounterfactualTrainer(config, tmp_path)
    network = trainer.run()
    assert network.config.num_extra == 1
    assert trainer.gain > 0.05  # of all requests
    episode = trainer.scenario.episode(1, load=4.0, num_requests=400)
    simulator = Simulator(trainer.scenario.spec, [episode])
    run(simulator, TorchPolicy(network))
    rejected = simulator.outcomes()["rejected"]
    assert 0 < rejected.mean() < 0.9


def test_fleets_in_which_kv_moves_are_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ConfigError, match="some of pd-equal only prefill or decode: take"):
        CounterfactualTrainer(tiny(1, scenario="pd-equal"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_demonstration_says_how_its_policy_stands_and_in_what_it_differs(
    write_scenario, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    path = write_scenario()
    words = ["demo", "--scenario", path, "--minutes", "0.02", "--seeds", "2"]
    main([*words, "--out", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "Load 1: mean E2E of counterfactual over that of" in said
    assert "counterfactual does not do what" in said
    page = (tmp_path / "report.html").read_text()
    assert "What counterfactual does otherwise than" in page
    assert (tmp_path / "counterfactual" / "policy" / "policy.onnx").is_file()
