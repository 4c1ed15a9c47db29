"""`servegym train --learner rllib` and `evaluate --ray`: processes of their own, equal answers."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch
import yaml

from servegym.agents.rllib_module import DispatchModule
from servegym.evaluate.harness import evaluate
from servegym.evaluate.on_ray import evaluate_on_ray
from servegym.export.resolve import resolve_policy
from servegym.export.sample import sample_observations
from servegym.policy.contract import NUM_REPLICA_FEATURES, NUM_REQUEST_FEATURES
from servegym.policy.policy import Observations
from servegym.problems.registry import load_problem
from servegym.train.rllib import RllibTrainer
from servegym.train.rllib_settings import RllibTraining

SMALL = {
    "name": "small",
    "engine": {"block_size": 16, "max_num_seqs": 16},
    "fleet": [{"gpu": "H100-SXM-80GB"}, {"gpu": "L40S", "count": 2}],
    "workload": {
        "kind": "generated",
        "rate_rps": 30.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 1000},
        "output": {"medians_tokens": [30.0], "max_tokens": 100},
    },
    "actions": {"hold": True, "reject": True},
    "num_requests": 40,
}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("scenario") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def settings(scenario: str, **changes) -> RllibTraining:
    usual = {
        "total_decisions": 512,
        "decisions_per_update": 128,
        "minibatch": 64,
        "epochs": 1,
        "num_envs": 2,
        "num_requests": 30,
        "validate_every": 2,
        "validation_episodes": 2,
        "validation_requests": 30,
    }
    return RllibTraining(scenario=scenario, **{**usual, **changes})


def test_a_killed_run_goes_on_and_exports_what_rllib_has(scenario, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    real = RllibTrainer.improve

    def improve(self):
        if self.update == 3:
            raise Killed
        return real(self)

    config = settings(scenario, num_env_runners=0)
    with monkeypatch.context() as patch:
        patch.setattr(RllibTrainer, "improve", improve)
        with pytest.raises(Killed):
            RllibTrainer(config, tmp_path / "run").run()
    trainer = RllibTrainer(config, tmp_path / "run")
    trainer.prepare()
    (weights,) = trainer.learner.learner_group.get_weights().values()
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["network"]
    assert all(np.array_equal(weights[f"network.{k}"], x.numpy()) for k, x in stored.items())
    monkeypatch.setattr(RllibTrainer, "close_stage", lambda self: None)
    trainer.run()
    assert trainer.update == 4
    assert len(trainer.history) == 2  # a checkpoint every 2 updates
    module = trainer.learner.get_module()
    assert isinstance(module, DispatchModule)
    trainer.best = {name: x.clone() for name, x in module.network.state_dict().items()}
    policy = resolve_policy(str(trainer.export()))
    replicas, request, mask = sample_observations(trainer.network, trainer.scenario, num=512)
    seen = {"replicas": replicas, "request": request, "action_mask": mask.astype(np.int8)}
    batch = {"obs": {name: torch.from_numpy(x) for name, x in seen.items()}}
    logits = module.forward_inference(batch)["action_dist_inputs"]
    assert (logits[torch.from_numpy(mask) == 0] < -1e7).all()
    features = np.zeros((len(request), NUM_REPLICA_FEATURES, replicas.shape[1]))
    features[:, : replicas.shape[2]] = replicas.transpose(0, 2, 1)
    asked = np.zeros((len(request), NUM_REQUEST_FEATURES))
    asked[:, : request.shape[1]] = request
    acted = policy.act(Observations(features, asked, mask > 0), np.zeros(len(mask), np.int64))
    np.testing.assert_array_equal(acted, logits.argmax(-1).numpy())
    trainer.learner.stop()


@pytest.mark.parametrize("algorithm", ["ppo", "appo", "impala"])
def test_algorithms_learn_with_runners_of_their_own(scenario, tmp_path, algorithm):
    config = settings(scenario, algorithm=algorithm, total_decisions=256, num_env_runners=1)
    trainer = RllibTrainer(config, tmp_path)
    before = {name: x.clone() for name, x in trainer.network.state_dict().items()}
    trainer.run()
    assert np.isfinite(trainer.last["train/policy_loss"])
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["network"]
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_evaluation_over_the_cluster_has_the_same_numbers(scenario):
    problem, loaded = load_problem(scenario)
    texts, loads = ["random", "added-delay:prefill=1.5"], [0.5, 1.0]
    here = evaluate(loaded, [problem.resolve(x) for x in texts], loads=loads, num_seeds=3)
    there = evaluate_on_ray(loaded, texts, loads=loads, num_seeds=3)
    assert here.runs == there.runs
    assert here.policies == there.policies
    assert here.seeds == there.seeds
    assert set(here.trails) == set(there.trails)
    assert set(there.decision_s) == set(here.decision_s)
