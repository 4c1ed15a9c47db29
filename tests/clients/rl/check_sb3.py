"""Stable-Baselines3's checker, algorithms and wrappers; sb3-contrib's masks."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecVideoRecorder,
)

from servegym.envs.sb3 import DispatchVecEnv, PreemptionVecEnv, WorkflowVecEnv

NATIVE = {
    "servegym/Dispatch-v0": DispatchVecEnv,
    "servegym/Preemption-v0": PreemptionVecEnv,
    "servegym/Workflow-v0": WorkflowVecEnv,
}
QUIET = {"seed": 0, "device": "cpu"}


@pytest.mark.parametrize("settings", [{}, {"flat": True}, {"normalise": True}])
def test_checker(case, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # matrices of rows are what its flattening extractor is for
        warnings.filterwarnings("ignore", ".*unconventional shape")
        check_env(case.make(invalid_action="resample", **settings).unwrapped)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, RecurrentPPO])
def test_algorithms_without_masks(one, algorithm):
    settings = {**one.settings, "normalise": True, "invalid_action": "penalise"}
    env = make_vec_env(one.env_id, n_envs=2, env_kwargs=settings)  # with rgb_array
    steps = {"learning_starts": 20} if algorithm is DQN else {"n_steps": 16}
    policy = "MultiInputLstmPolicy" if algorithm is RecurrentPPO else "MultiInputPolicy"
    model = algorithm(policy, env, **steps, **QUIET).learn(64)
    assert model.num_timesteps >= 64
    env.close()


@pytest.mark.parametrize("native", [True, False])
def test_masks_with_stock_wrappers(one, native, tmp_path):
    settings = {**one.settings, "flat": True}
    env = NATIVE[one.env_id](2, **settings) if native else None
    env = env or make_vec_env(one.env_id, n_envs=2, env_kwargs=settings)
    env = VecNormalize(VecFrameStack(VecCheckNan(env, raise_exception=True), 3))
    model = MaskablePPO("MlpPolicy", env, n_steps=16, batch_size=16, **QUIET).learn(64)
    model.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 5_000_000  # without the environment
    assert MaskablePPO.load(tmp_path / "model").action_space == env.action_space
    env.close()


def test_native_form_is_the_dummy_one(one):
    settings = {**one.settings, "invalid_action": "resample"}
    ours = NATIVE[one.env_id](2, **settings)
    theirs = make_vec_env(one.env_id, n_envs=2, env_kwargs=settings)
    ours.seed(4)
    theirs.seed(4)
    got, want = ours.reset(), theirs.reset()
    rng, ends = np.random.default_rng(0), 0
    for _ in range(200):
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


def test_evaluation_and_video(one, tmp_path):
    env = NATIVE[one.env_id](
        2, **one.settings, flat=True, invalid_action="resample", render_mode="rgb_array"
    )
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of environments without a monitor
        mean, _ = evaluate_policy(model, env, n_eval_episodes=2)
    assert np.isfinite(mean)
    assert env.render().shape[1:] == (2 * 960, 3) or env.render().shape[1] == 960
    video = VecVideoRecorder(
        VecMonitor(env), str(tmp_path), record_video_trigger=lambda step: step == 0, video_length=3
    )
    model.set_env(video)
    model.learn(32)
    video.close()
    assert list(tmp_path.glob("*.mp4"))


def test_processes(one):
    settings = {**one.settings, "invalid_action": "resample", "normalise": True}
    env = make_vec_env(one.env_id, n_envs=2, env_kwargs=settings, vec_env_cls=SubprocVecEnv)
    A2C("MultiInputPolicy", env, **QUIET).learn(20)
    env.close()
