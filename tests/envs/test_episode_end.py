"""Where episodes begin and end for the agent: warm-up, and truncation at the last arrival."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.envs.dispatch import DispatchEnv, DispatchVectorEnv
from servegym.errors import ConfigError
from servegym.policy.contract import ReplicaFeature

OUTSTANDING = int(ReplicaFeature["OUTSTANDING_REQUESTS"])


def random_action(mask, rng):
    return (rng.random(mask.shape) * mask).argmax(-1)


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key in got:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)


def test_episode_is_cut_at_the_last_arrival_and_is_the_drained_one_up_to_there(problem):
    cut = problem.single(**problem.settings, episode_end="last-arrival")
    whole = problem.single(**problem.settings)
    rng = np.random.default_rng(0)
    seen, _ = cut.reset(seed=1)
    assert_same(seen, whole.reset(seed=1)[0])
    steps, truncated = 0, False
    while not truncated:
        action = random_action(cut.action_masks(), rng)
        seen, reward, done, truncated, info = cut.step(action)
        same, expected, over, never, _ = whole.step(action)
        assert_same(seen, same)  # the last one too: what follows can be estimated from it
        assert (reward, done, over, never) == (expected, False, False, False)
        assert seen in cut.observation_space
        steps += 1
    arrived, in_all = cut.batch._arrivals()
    assert arrived[0] == in_all[0]
    assert cut.action_masks().any()
    # results are of what has ended so far
    ended = int(cut.batch.simulator.state.env[0]["num_ended"])
    assert ended < in_all[0]
    assert (next(iter(info["episode_metrics"].values())) > 0.0) == (ended > 0)
    assert cut.reset()[0] in cut.observation_space


def test_dispatch_has_one_decision_less_than_requests(make_scenario):
    env = DispatchVectorEnv(
        2, make_scenario(), episode_end="last-arrival", autoreset_mode="SameStep"
    )
    whole = DispatchVectorEnv(2, make_scenario(), autoreset_mode="SameStep")
    _, info = env.reset(seed=0)
    whole.reset(seed=0)
    for step in range(39):
        seen, _, terminated, truncated, info = env.step(np.array([step % 3, 0]))
        want, *_ = whole.step(np.array([step % 3, 0]))
        assert not terminated.any()
        assert truncated.all() == (step == 38) == ("final_obs" in info)
    for e in range(2):
        assert_same(info["final_obs"][e], {k: v[e] for k, v in want.items()})
        assert not np.array_equal(seen["replicas"][e], want["replicas"][e])  # the next episode's


def test_truncation_reaches_stable_baselines3_which_bootstraps(make_scenario):
    sb3 = pytest.importorskip("stable_baselines3")
    import torch

    from servegym.envs.sb3 import DispatchVecEnv

    torch.set_num_threads(1)
    settings = {"flat": True, "normalise": True, "num_requests": 6}
    rewards = {}
    for end in ("last-arrival", "drained"):
        env = DispatchVecEnv(1, make_scenario(), episode_end=end, **settings)
        model = sb3.A2C("MlpPolicy", env, n_steps=6, gamma=0.5, seed=0, device="cpu")
        with torch.no_grad():
            model.policy.value_net.bias.fill_(1000.0)
        model._setup_learn(6)
        model.collect_rollouts(model.env, _Nothing(model), model.rollout_buffer, 6)
        rewards[end] = model.rollout_buffer.rewards[:, 0]
    # the fifth decision of six is the last one before the last arrival
    assert (rewards["drained"] < 0.0).all()
    assert (rewards["last-arrival"][:4] < 0.0).all()
    assert rewards["last-arrival"][4] > 400.0  # gamma times the value of the final observation


def _Nothing(model):
    from stable_baselines3.common.callbacks import ConvertCallback

    callback = ConvertCallback(None)
    callback.init_callback(model)
    return callback


def test_infos_of_stable_baselines3_say_what_was_cut(make_scenario):
    pytest.importorskip("stable_baselines3")
    from servegym.envs.sb3 import DispatchVecEnv

    for end, cut in (("last-arrival", True), ("drained", False)):
        env = DispatchVecEnv(2, make_scenario(), episode_end=end, num_requests=8)
        env.reset()
        dones = np.zeros(2, bool)
        while not dones.any():
            seen, _, dones, infos = env.step(np.zeros(2, np.int64))
        for e in range(2):
            assert infos[e]["TimeLimit.truncated"] is cut
            last = infos[e]["terminal_observation"]
            assert last in env.observation_space
            assert last["replicas"].any() == cut  # a drained cluster has nothing to show
            assert not np.array_equal(last["replicas"], seen["replicas"][e])


def test_warm_up_is_least_outstanding_and_counts_for_nothing(make_scenario):
    settings = {"num_requests": 40, "load": 2.0}
    env = DispatchEnv(make_scenario(), warmup=15, **settings)
    by_hand = DispatchEnv(make_scenario(), **settings)
    seen, info = env.reset(seed=3)
    same, _ = by_hand.reset(seed=3)
    for _ in range(15):
        same, *_, there = by_hand.step(int(same["replicas"][:, OUTSTANDING].argmin()))
    assert_same(seen, same)
    assert info["now_s"] == there["now_s"]
    assert info["dt_s"] == 0.0
    assert seen["replicas"][:, OUTSTANDING].sum() > 3  # no empty system
    rewards, done = [], False
    while not done:
        _, reward, done, _, info = env.step(0)
        assert reward == by_hand.step(0)[1]
        rewards.append(reward)
    assert len(rewards) == 25
    fate = env.batch.simulator.outcomes(0)[15:]
    mean_s = (fate["finish_s"] - fate["arrival_s"]).mean()
    assert info["episode_metrics"]["mean_e2e_s"] == pytest.approx(mean_s, rel=1e-12)


def test_warm_up_plays_the_documented_rule_everywhere(problem):
    env = problem.single(**problem.settings, warmup=1)
    for seed in range(5):
        seen, info = env.reset(seed=seed)
        assert seen in env.observation_space
        assert env.batch._arrivals()[0][0] >= 2
        assert info["action_mask"].any()
        done = False
        while not done:
            mask = env.action_masks()
            _, reward, done, _, _ = env.step(int(mask.argmax()))
            assert np.isfinite(reward)


def test_only_the_environment_that_begins_is_warmed_up(problem):
    env = problem.vector(3, **problem.settings, warmup=1, autoreset_mode="Disabled")
    env.reset(seed=0)
    before = env.batch.simulator.state.env[[0, 2]].copy()
    env.reset(options={"reset_mask": np.array([False, True, False])})
    assert env.batch.simulator.state.env[[0, 2]].tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "settings", [{"warmup": 500}, {"warmup": 4, "episode_end": "last-arrival", "num_requests": 5}]
)
def test_episode_without_a_decision_for_the_agent_is_refused(make_scenario, settings):
    env = DispatchEnv(make_scenario(), **settings)
    with pytest.raises(ConfigError, match="leaves the agent no decision with a warmup of"):
        env.reset(seed=0)


def test_closed_loops_are_warmed_up_and_cut_by_what_has_arrived():
    """Of chats most rows wait for others: the last that begins by itself is not the last."""
    settings = {"scenario": "mixed-chat", "num_requests": 60, "load": 0.02}
    env = DispatchEnv(warmup=20, episode_end="last-arrival", **settings)
    _, info = env.reset(seed=3)
    steps, truncated = 0, False
    while not truncated:
        _, _, done, truncated, info = env.step(int(info["action_mask"].argmax()))
        assert not done
        steps += 1
    assert steps == 60 - 20 - 1  # one decision a request; the last is the next episode's to judge
    outcomes = env.batch.simulator.outcomes(0)
    assert np.isfinite(outcomes["arrival_s"]).all()
    began_s = np.sort(outcomes["arrival_s"])[20]
    counted = outcomes[(outcomes["arrival_s"] >= began_s) & np.isfinite(outcomes["finish_s"])]
    want = (counted["finish_s"] - counted["arrival_s"]).mean()
    assert info["episode_metrics"]["mean_e2e_s"] == pytest.approx(want, rel=1e-12)
    table = env.batch.simulator.episodes[0].table
    assert (table.after >= 0).sum() > 20
