"""The adapter to Stable-Baselines3 and sb3-contrib."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")

from gymnasium.wrappers import FlattenObservation  # noqa: E402
from stable_baselines3.common.env_checker import check_env  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize  # noqa: E402

from servegym.envs.dispatch import DispatchEnv, DispatchVectorEnv  # noqa: E402
from servegym.envs.sb3 import (  # noqa: E402
    ClusterVecEnv,
    DispatchVecEnv,
    PreemptionVecEnv,
    WorkflowVecEnv,
)

NATIVE = {
    "servegym/Dispatch-v1": DispatchVecEnv,
    "servegym/Preemption-v0": PreemptionVecEnv,
    "servegym/Cluster-v0": ClusterVecEnv,
    "servegym/Workflow-v0": WorkflowVecEnv,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("settings", [{}, {"flat": True}, {"normalise": True}])
def test_single_environment_passes_the_checker_of_sb3(problem, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # matrices of rows are what its flattening extractor is for, and no images
        warnings.filterwarnings("ignore", ".*(unconventional shape|image)")
        check_env(problem.single(**problem.settings, **settings))


def test_native_form_is_the_dummy_one(problem):
    settings = {**problem.settings, "invalid_action": "resample"}
    ours = NATIVE[problem.env_id](2, **settings)
    theirs = make_vec_env(problem.single, n_envs=2, env_kwargs=settings)
    ours.seed(4)
    theirs.seed(4)
    got, want = ours.reset(), theirs.reset()
    rng, ends = np.random.default_rng(0), 0
    for _ in range(60):
        for key in want:
            np.testing.assert_array_equal(got[key], want[key])
        actions = rng.integers(ours.action_space.n, size=2)
        got, reward, done, infos = ours.step(actions)
        want, expected, over, their_infos = theirs.step(actions)
        np.testing.assert_array_equal(reward, expected)
        assert reward.dtype == expected.dtype
        np.testing.assert_array_equal(done, over)
        for e in np.flatnonzero(done):
            ends += 1
            mine, other = infos[e], their_infos[e]
            assert mine["TimeLimit.truncated"] == other["TimeLimit.truncated"]
            assert mine["episode_metrics"] == other["episode_metrics"]
            assert mine["episode"]["l"] == other["episode"]["l"]
            assert mine["episode"]["r"] == pytest.approx(other["episode"]["r"], abs=1e-4)
            for key, value in other["terminal_observation"].items():
                np.testing.assert_array_equal(mine["terminal_observation"][key], value)
    assert ends > 0


def test_stock_wrappers_and_masks_go_together(problem):
    env = NATIVE[problem.env_id](2, **problem.settings, flat=True)
    stacked = VecNormalize(VecFrameStack(env, 3))
    model = contrib.MaskablePPO(
        "MlpPolicy", stacked, n_steps=8, batch_size=16, n_epochs=1, seed=0, device="cpu"
    )
    model.learn(32)
    assert stacked.observation_space.shape == (3 * env.observation_space.shape[0],)
    assert np.abs(stacked.reset()).max() <= 10


def test_adapter_plays_what_the_vector_environment_plays(make_scenario):
    adapter = DispatchVecEnv(2, make_scenario(), num_requests=10)
    plain = DispatchVectorEnv(2, make_scenario(), num_requests=10, autoreset_mode="SameStep")
    adapter.seed(3)
    got, (want, _) = adapter.reset(), plain.reset(seed=[3, 4])
    np.testing.assert_array_equal(got["replicas"], want["replicas"])
    total = np.zeros(2)
    for step in range(10):
        actions = np.array([step % 3, 0])
        got, rewards, dones, infos = adapter.step(actions)
        want, expected, _, _, info = plain.step(actions)
        np.testing.assert_array_equal(got["replicas"], want["replicas"])
        np.testing.assert_array_equal(rewards, expected.astype(np.float32))
        total += rewards
    assert dones.all()
    for e in range(2):
        assert infos[e]["episode"]["l"] == 10
        assert infos[e]["episode"]["r"] == pytest.approx(total[e])
        assert infos[e]["TimeLimit.truncated"] is False
        last = info["final_obs"][e]
        for key, value in infos[e]["terminal_observation"].items():
            np.testing.assert_array_equal(value, last[key])
    adapter.close()


def test_a2c_learns_twice(make_scenario):
    env = DispatchVecEnv(2, make_scenario())
    model = sb3.A2C("MultiInputPolicy", env, n_steps=8, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(64)
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 128
    assert (
        len(model.ep_info_buffer) == 2
    )  # 64 steps of 2 environments hold one 40-step episode each
    changed = [
        not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)
    ]
    assert any(changed)


def test_dqn_learns_on_the_flattened_single_environment(make_scenario):
    model = sb3.DQN(
        "MlpPolicy",
        FlattenObservation(DispatchEnv(make_scenario())),
        learning_starts=20,
        buffer_size=500,
        seed=0,
        device="cpu",
    )
    model.learn(100)
    model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps == 200


def test_maskable_ppo_keeps_to_the_masks(make_scenario):
    # 3 of 9 actions are allowed: 256 decisions without the mask would raise InvalidAction
    env = DispatchVecEnv(4, make_scenario(), r_max=9)
    model = contrib.MaskablePPO(
        "MultiInputPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0, device="cpu"
    )
    model.learn(128)
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 256
    observation = env.reset()
    masks = np.stack(env.env_method("action_masks"))
    np.testing.assert_array_equal(masks, observation["action_mask"] == 1)
    for _ in range(20):
        actions, _ = model.predict(observation, action_masks=masks)
        assert (actions < 3).all()


def test_unknown_method_is_refused(make_scenario):
    env = DispatchVecEnv(2, make_scenario())
    assert env.has_attr("action_masks")
    assert not env.has_attr("no_such_thing")
    with pytest.raises(AttributeError, match="no method render"):
        env.env_method("render")
