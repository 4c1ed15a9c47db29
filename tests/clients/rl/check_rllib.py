"""RLlib: PPO's own environment runners, one environment at a time and ours in one call."""

from __future__ import annotations

import gymnasium
import pytest
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune import register_env


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_ppo(one, mode):
    settings = {**one.settings, "flat": True, "normalise": True, "invalid_action": "penalise"}

    def make(context):
        if mode == "sync":
            return gymnasium.make(one.env_id, **settings)
        return gymnasium.make_vec(one.env_id, context["num_envs"], **settings)

    name = f"{one.env_id}-{mode}"
    register_env(name, make)
    config = (
        PPOConfig()
        .environment(name)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, gym_env_vectorize_mode=mode)
        # enough for an episode to end: of 40 requests in a starved engine some take 120 steps
        .training(train_batch_size_per_learner=500, minibatch_size=50, num_epochs=1)
        .learners(num_learners=0)
    )
    algorithm = config.build_algo()
    result = algorithm.train()
    runners = result["env_runners"]
    assert runners["num_env_steps_sampled_lifetime"] >= 500
    assert runners["episode_return_mean"] == runners["episode_return_mean"]  # not NaN
    algorithm.stop()
