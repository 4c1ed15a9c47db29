"""RLlib over a fleet's agents: its own checks, equal episodes, shared policies in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.pre_checks.env import check_multiagent_environments

from servegym.agents.rllib_module import masked_module
from servegym.envs import cluster_v0
from servegym.envs.rllib import cluster_env, cluster_env_runner, policy_of, register
from servegym.errors import InvalidAction, ResetNeeded

SMALL = {"scenario": "kv-starved-fleet", "num_requests": 40, "load": 4.0, "max_waiting": 8}
TRUNCATED = {**SMALL, "episode_end": "last-arrival"}


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def drawn(rng, seen):
    return {
        agent: int(rng.choice(np.flatnonzero(view["action_mask"]))) for agent, view in seen.items()
    }


def test_rllibs_own_check_passes():
    check_multiagent_environments(cluster_env()(SMALL))


@pytest.mark.parametrize("settings", [SMALL, TRUNCATED], ids=["terminated", "truncated"])
def test_each_agent_earns_what_it_earns_in_pettingzoo(settings):
    env, other = cluster_env()(settings), cluster_v0.raw_env(**settings)
    seen, _ = env.reset(seed=3)
    other.reset(seed=3)
    earned, want = dict.fromkeys(env.agents, 0.0), dict.fromkeys(env.agents, 0.0)
    over, decided, rng = False, set(), np.random.default_rng(0)
    while not over:
        (agent,) = seen
        assert agent == other.agent_selection
        assert seen[agent] in env.get_observation_space(agent)
        decided.add(agent)
        actions = drawn(rng, seen)
        other.step(actions[agent])
        seen, rewards, terminated, truncated, infos = env.step(actions)
        for name in env.agents:
            earned[name] += rewards.get(name, 0.0)
            # what came before an agent decided for the first time is nobody's doing
            want[name] += other.rewards[name] * (name in decided)
        over = terminated["__all__"] or truncated["__all__"]
    assert truncated["__all__"] == (settings is TRUNCATED)
    assert set(seen) == (decided if settings is TRUNCATED else set())
    assert len(decided) == 5
    assert earned == pytest.approx(want)
    metrics = other.infos[other.agents[0]]["episode_metrics"]
    assert infos["__common__"]["episode_metrics"] == metrics
    with pytest.raises(ResetNeeded):
        env.step(actions)
    env.reset()
    with pytest.raises(InvalidAction, match="dispatcher_0 is asked in fleet 0 and must act, got"):
        env.step({"scheduler_1": 0})


@pytest.mark.parametrize("runner", [None, cluster_env_runner()], ids=["one by one", "one call"])
def test_ppo_trains_a_policy_of_all_schedulers_and_one_of_the_dispatcher(runner):
    settings = {**SMALL, "normalise": True, "shaping": "cost-to-go", "reward_scale": "auto"}
    module = RLModuleSpec(module_class=masked_module(), model_config={"hidden": 16})
    config = (
        PPOConfig()
        .environment(register(), env_config=settings)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4, env_runner_cls=runner)
        .multi_agent(policies={"dispatcher", "scheduler"}, policy_mapping_fn=policy_of)
        .rl_module(
            rl_module_spec=MultiRLModuleSpec(
                rl_module_specs={"dispatcher": module, "scheduler": module}
            )
        )
        .training(train_batch_size_per_learner=1200, minibatch_size=100, num_epochs=1)
        .learners(num_learners=0)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    before = {
        name: {k: v.copy() for k, v in weights.items()}
        for name, weights in algorithm.learner_group.get_weights().items()
    }
    result = algorithm.train()
    after = algorithm.learner_group.get_weights()
    assert set(after) >= {"dispatcher", "scheduler"}
    for name in ("dispatcher", "scheduler"):
        moved = [np.abs(after[name][k] - v).max() for k, v in before[name].items()]
        assert min(moved) > 0.0
        loss = result["learners"][name]["policy_loss"]
        assert loss == loss  # not NaN
    runners = result["env_runners"]
    assert runners["num_env_steps_sampled_lifetime"] >= 1200
    assert runners["episode_return_mean"] == runners["episode_return_mean"]
    algorithm.stop()
