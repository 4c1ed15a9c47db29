"""Training a scheduler of jobs: arithmetic by hand, recording, learning, resuming, export."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml

from servegym.agents.workflow_features import NUM_PAIR_FEATURES, PAIR_FEATURES
from servegym.agents.workflow_network_config import WorkflowNetworkConfig
from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
from servegym.baselines.workflow.online.registry import online_rule
from servegym.cli import main
from servegym.errors import ConfigError, ExportError
from servegym.export.workflow import export_scheduler, read_scheduler
from servegym.train import training_run, workflow
from servegym.train.run_folder import RunFolder
from servegym.train.search import Search
from servegym.train.workflow import WorkflowTrainer
from servegym.train.workflow_arrays import advantages, choices, discounted
from servegym.train.workflow_rollout import Played, play
from servegym.train.workflow_search import first_search, losses
from servegym.train.workflow_settings import WorkflowTraining
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow_scenario import load_workflow_scenario


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A scenario of jobs on one fast and two slow devices."""
    data = {
        "kind": "workflow",
        "name": "small",
        "devices": [{"name": "a"}, {"name": "b", "count": 2}],
        "workload": {"kind": "random-dag", "device_types": ["a", "b"], "num_tasks": 6},
        "rate_jobs_per_s": 0.3,
        "disturbances": {"noise_sigma": 0.2},
        "num_jobs": 12,
    }
    file = tmp_path_factory.mktemp("scenario") / "small.yaml"
    file.write_text(yaml.safe_dump(data))
    return str(file)


@pytest.fixture(scope="module")
def tiny(path):
    """Return a maker of settings for runs of a few seconds."""

    def make(**settings) -> WorkflowTraining:
        defaults = {
            "scenario": path,
            "num_jobs": (5, 8),
            "pool_size": 40,
            "max_minutes": 100.0,
            "search_share": 0.0,
            "groups": 2,
            "group_size": 2,
            "minibatches": 2,
            "warmup_updates": 0,
            "validate_every": 2,
            "validation_episodes": 3,
        }
        return WorkflowTraining(**{**defaults, **settings})

    return make


def played_by_hand(**changes) -> Played:
    """Three decisions at 0, 2 and 5 s; one job in the system, a second from 2 s on; end at 6 s."""
    fields = {
        "features": np.zeros((3, NUM_PAIR_FEATURES), np.float32),
        "base": np.zeros(3, np.float32),
        "stage": np.arange(3),
        "device": np.zeros(3, np.int64),
        "first": np.arange(4),
        "chosen": np.zeros(3, np.int64),
        "may_wait": np.zeros(3, np.int64),
        "time_s": np.array([0.0, 2.0, 5.0]),
        "earned": np.array([0.0, -2.0, -8.0, -10.0]),
        "end_s": 6.0,
        "stages": np.zeros((3, 8), np.float32),
        "job": np.zeros(3, np.int64),
        "hidden": np.zeros(3, np.int64),
        "parent": np.zeros(0, np.int64),
        "child": np.zeros(0, np.int64),
        "depth": 1,
    }
    return Played(**{**fields, **changes})


def test_discounted_returns_by_hand():
    half_life = 1.0 / math.log(2.0)  # a second halves
    got = discounted(played_by_hand(), half_life)
    last = -2 * 0.5**0.5
    middle = -6 * 0.5**1.5 + 0.5**3 * last
    first = -2 * 0.5**1.0 + 0.5**2 * middle
    np.testing.assert_allclose(got, [first, middle, last])


def test_advantages_with_lambda_one_are_returns_less_values():
    values = np.array([3.0, -1.0, 0.5])
    got = advantages(played_by_hand(), values, 4.0, 1e12, 2.0)
    np.testing.assert_allclose(got, discounted(played_by_hand(), 4.0) / 2.0 - values)


def test_advantages_with_lambda_zero_are_one_step_errors():
    values = np.array([3.0, -1.0, 0.5])
    got = advantages(played_by_hand(), values, 1e12, 1e-9, 1.0)
    np.testing.assert_allclose(got, [-2 - 1 - 3, -6 + 0.5 + 1, -2 - 0.5], rtol=1e-6)


def test_choices_by_hand():
    scores = torch.tensor([0.0, math.log(2.0), math.log(3.0)])
    log_prob, entropy = choices(
        scores,
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 2]),
        torch.tensor([1, 1]),  # the second pair of the first decision; the other waits
        torch.tensor([2, 1]),
        torch.tensor([False, True]),
    )
    # 1 : 2 without waiting; 3 : 1 for waiting
    torch.testing.assert_close(log_prob.exp(), torch.tensor([2 / 3, 1 / 4]))
    want = [-sum(p * math.log(p) for p in ps) for ps in ((1 / 3, 2 / 3), (3 / 4, 1 / 4))]
    torch.testing.assert_close(entropy, torch.tensor(want))


def test_choices_stay_finite_for_great_scores():
    log_prob, entropy = choices(
        torch.tensor([500.0, -500.0]),
        torch.tensor([0, 0]),
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([2]),
        torch.tensor([True]),
    )
    assert log_prob.tolist() == [0.0]
    assert entropy.tolist() == [0.0]


@pytest.mark.parametrize("objective", ["jct", "makespan", "deadline"])
def test_what_is_earned_sums_up_to_the_objective(path, objective):
    scenario = load_workflow_scenario(path)
    episodes = [scenario.episode(i) for i in range(3)]
    policy = learned_rule(WorkflowWeights("srpt-cp", 5.0, 1.0, np.zeros(NUM_PAIR_FEATURES)))
    simulator = Simulator(scenario.spec, episodes)
    run(simulator, policy)
    want = {
        "jct": [
            -float((jobs["finish_s"] - jobs["arrival_s"]).sum())
            for jobs in map(simulator.jobs, range(3))
        ],
        "makespan": [-float(simulator.jobs(e)["finish_s"].max()) for e in range(3)],
        "deadline": [12.0] * 3,  # there are none
    }[objective]
    found = play(scenario.spec, episodes, policy, objective=objective, tau_s=1.0)
    assert [one.earned[-1] for one in found] == pytest.approx(want)
    for env, one in enumerate(found):
        assert len(one.chosen) == simulator.state.env[env]["num_decisions"]
        assert (np.diff(one.time_s) >= 0).all()
        assert one.first[-1] == len(one.features) == len(one.stage)


def test_losses_are_logarithms_of_means(path):
    scenario = load_workflow_scenario(path)
    episodes = [scenario.episode(i) for i in range(2)]
    simulator = Simulator(scenario.spec, episodes)
    run(simulator, online_rule("fifo"))
    jobs = [simulator.jobs(e) for e in range(2)]
    want = [np.log((j["finish_s"] - j["arrival_s"]).mean()) for j in jobs]
    np.testing.assert_allclose(losses(scenario.spec, episodes, online_rule("fifo"), "jct"), want)
    assert losses(scenario.spec, episodes, online_rule("fifo"), "deadline").tolist() == [-1.0, -1.0]


def test_search_finds_the_least_of_a_bowl():
    goal = np.linspace(-1, 1, NUM_PAIR_FEATURES)
    search, rng = first_search("srpt-cp"), np.random.default_rng(0)
    assert (search.mean == 0).all()
    for _ in range(60):
        search.step(lambda theta: float(((theta - goal) ** 2).sum()), rng)
    assert np.abs(search.mean - goal).mean() < 0.15
    with pytest.raises(ConfigError, match=r"elite must be within 1\.\.4"):
        search.step(lambda theta: 0.0, rng, size=4, elite=5)


def test_search_makes_a_scheduler_better(tiny, tmp_path):
    trainer = WorkflowTrainer(
        tiny(search_share=1.0, max_generations=8, max_updates=0, load=(1.0, 1.4)), tmp_path
    )
    trainer.run()
    assert trainer.search.generation == 8
    assert trainer.gain > 0.0


def test_ppo_moves_towards_what_is_better(tiny, tmp_path):
    # a policy that prefers slow devices; PPO alone must unlearn that
    config = tiny(
        max_updates=25,
        learning_rate=1e-2,
        validate_every=5,
        load=(0.5, 0.6),
        network=WorkflowNetworkConfig(hidden=8),
    )
    trainer = WorkflowTrainer(config, tmp_path)
    theta = np.zeros(NUM_PAIR_FEATURES)
    theta[0], theta[PAIR_FEATURES.index("is_best")] = 4.0, -1.0
    trainer.search.mean = theta
    trainer._set_theta(theta)
    trainer._sharpen = lambda: None
    trainer.first_scores = trainer.best_scores = trainer.validate().scores
    trainer.run()
    assert trainer.gain > 0.05


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed", ["generation 7", "update 3"])
def test_interrupted_run_ends_as_an_uninterrupted_one(tiny, tmp_path, monkeypatch, killed):
    # no clock: only generations and updates count
    config = tiny(max_minutes=math.inf, search_share=0.5, max_generations=8, max_updates=5)

    def saved(folder):
        return torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True)

    whole = WorkflowTrainer(config, tmp_path / "whole")
    whole.run()
    real_step, real_ppo = Search.step, WorkflowTrainer._ppo

    def step(self, *arguments):
        if killed == f"generation {self.generation}":
            raise Killed
        return real_step(self, *arguments)

    def ppo(self):
        if killed == f"update {self.update}":
            raise Killed
        return real_ppo(self)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "step", step)
        patch.setattr(WorkflowTrainer, "_ppo", ppo)
        with pytest.raises(Killed):
            WorkflowTrainer(config, tmp_path / "parts").run()
    again = WorkflowTrainer(config, tmp_path / "parts")
    again.prepare()
    assert (again.search.generation, again.update) == ((5, 0) if "gen" in killed else (8, 2))
    again.run()
    assert (again.search.generation, again.update) == (8, 5)
    for part in ("network", "best"):
        got, want = saved("parts")[part], saved("whole")[part]
        assert all(torch.equal(got[name], want[name]) for name in want)
    np.testing.assert_array_equal(again.search.mean, whole.search.mean)
    np.testing.assert_array_equal(again.best_scores, whole.best_scores)
    # and a third sitting has nothing to do
    third = WorkflowTrainer(config, tmp_path / "parts")
    third.prepare()
    assert third.finished
    third.run()
    assert third.history == []


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"network": WorkflowNetworkConfig(base="srpt-cp")}, 'network.base is "none" there'),
        ({"objective": "makespan"}, 'objective is "" there, "makespan" here'),
        ({"num_jobs": (5, 9)}, r"num_jobs is \[5, 8\] there, \[5, 9\] here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"max_updates": 1}, "max_updates is 0 there, 1 here"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_any_other_setting_is_refused_by_name(tiny, tmp_path, other, named):
    RunFolder(tmp_path, "workflow", tiny(max_updates=0), scenario_of(tiny)).begin()
    with pytest.raises(ConfigError, match=rf"{named}.*: give another --out"):
        WorkflowTrainer(tiny(**{"max_updates": 0, **other}), tmp_path)


def scenario_of(tiny) -> dict[str, object]:
    return WorkflowTrainer.scenario_contents(load_workflow_scenario(tiny().scenario))


def test_checkpoint_without_a_key_is_refused_in_one_sentence(tiny, tmp_path):
    config = tiny(max_updates=0)
    WorkflowTrainer(config, tmp_path).run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for key in ("search", "best", "stage"):
        torch.save({k: v for k, v in content.items() if k != key}, tmp_path / "checkpoint.pt")
        with pytest.raises(ConfigError, match=rf"checkpoint\.pt lacks '{key}': delete it"):
            WorkflowTrainer(config, tmp_path).run()


def test_short_budget_holds_with_what_follows_the_search(tiny, tmp_path, monkeypatch):
    # a clock of our own: 1 s a generation, 0.1 s a validation, 2 s an update
    now = [0.0]
    monkeypatch.setattr(training_run.time, "monotonic", lambda: now[0])
    real_ppo, real_losses, real_step = WorkflowTrainer._ppo, workflow.losses, Search.step
    real_validate = WorkflowTrainer.validate

    def takes(seconds, real):
        def timed(*arguments, **named):
            now[0] += seconds
            return real(*arguments, **named)

        return timed

    monkeypatch.setattr(workflow, "losses", takes(0.1, real_losses))
    monkeypatch.setattr(WorkflowTrainer, "validate", takes(0.1, real_validate))
    monkeypatch.setattr(WorkflowTrainer, "_ppo", takes(2.0, real_ppo))
    monkeypatch.setattr(Search, "step", takes(1.0, real_step))
    trainer = WorkflowTrainer(tiny(max_minutes=20 / 60, search_share=0.8), tmp_path)
    now[0] += 300.0  # compiling
    assert trainer.prepare() > 300.0
    begin_s = now[0]
    trainer.run()
    assert trainer.search.generation >= 5
    assert trainer.update >= 1
    assert 15.0 < now[0] - begin_s <= 20.0 + 2.0  # the first update's length is not known before
    assert trainer.spent_s == pytest.approx(now[0] - begin_s)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"objective": "cost"}, "objective must be one of jct, makespan, deadline"),
        ({"load": (1.0, 0.5)}, "load must be two ascending"),
        ({"num_jobs": (0, 5)}, "num_jobs must be two ascending"),
        ({"max_minutes": 0.0}, "minutes must be above 0"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"groups": 0}, "groups must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        WorkflowTraining(**settings)


@pytest.mark.parametrize("message_passing", [True, False])
def test_an_exported_scheduler_plays_as_the_network(tiny, tmp_path, message_passing):
    config = tiny(network=WorkflowNetworkConfig(hidden=8, message_passing=message_passing))
    trainer = WorkflowTrainer(config, tmp_path / "run")
    with torch.no_grad():
        for tensor in trainer.network.parameters():
            tensor.normal_(std=0.3)
        trainer.network.theta.weight[0, 0] = 5.0
    trainer.best = trainer.network.state_dict()
    folder = tmp_path / "run" / "policy"
    path = export_scheduler(trainer.network, folder, trainer.samples(12), objective="jct")
    policy = read_scheduler(path)
    assert policy.name == "run"
    np.testing.assert_array_equal(policy.params, learned_rule(trainer.network.weights()).params)
    assert json.loads((folder / "manifest.json").read_text())["problem"] == "workflow"
    weights = folder / "weights.npz"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ExportError, match="changed after its manifest"):
        read_scheduler(path)
    weights.unlink()
    with pytest.raises(ExportError, match=r"weights\.npz is missing"):
        read_scheduler(path)


def test_train_export_and_evaluate_by_command(path, tmp_path, capsys):
    out = tmp_path / "mine"
    arguments = ["--scenario", path, "--minutes", "0.05", "--num-jobs", "5", "8"]
    main(["train", *arguments, "--out", str(out)])
    policy = out / "policy" / "policy.onnx"
    assert policy.is_file()
    policy.unlink()
    main(["export", "--run-folder", str(out)])
    command = ["evaluate", "--scenario", path, "--loads", "1.0", "--seeds", "2"]
    main([*command, "--policies", "srpt-cp", str(policy)])
    shown = capsys.readouterr().out
    assert "mine" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments, "--imitate", "fifo", "--out", str(out)])
    assert stopped.value.code == 2
    assert "--imitate is for scenarios of dispatch, and" in capsys.readouterr().err
