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

from servegym.envs.sb3 import make_vec

QUIET = {"seed": 0, "device": "cpu"}


def native(one, num_envs, **settings):
    return make_vec(one.env_id, num_envs, **one.settings, **settings)


@pytest.mark.parametrize("settings", [{}, {"flat": True}, {"normalise": True}])
def test_checker(case, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # matrices of rows are what its flattening extractor is for, and no images
        warnings.filterwarnings("ignore", ".*(unconventional shape|image)")
        check_env(case.make(invalid_action="resample", **settings).unwrapped)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, RecurrentPPO])
def test_algorithms_without_masks(one, algorithm):
    settings = {**one.settings, "normalise": True, "flat": False, "invalid_action": "penalise"}
    env = make_vec_env(one.env_id, n_envs=2, env_kwargs=settings)  # with rgb_array
    steps = {"learning_starts": 20} if algorithm is DQN else {"n_steps": 16}
    policy = "MultiInputLstmPolicy" if algorithm is RecurrentPPO else "MultiInputPolicy"
    model = algorithm(policy, env, **steps, **QUIET).learn(64)
    assert model.num_timesteps >= 64
    env.close()


@pytest.mark.parametrize("ours", [True, False])
def test_masks_with_stock_wrappers(one, ours, tmp_path):
    if ours:
        env = native(one, 2, flat=True)
    else:
        env = make_vec_env(one.env_id, n_envs=2, env_kwargs={**one.settings, "flat": True})
    env = VecNormalize(VecFrameStack(VecCheckNan(env, raise_exception=True), 3))
    model = MaskablePPO("MlpPolicy", env, n_steps=16, batch_size=16, **QUIET).learn(64)
    model.save(tmp_path / "model")
    assert MaskablePPO.load(tmp_path / "model").action_space == env.action_space
    env.close()


def test_evaluation_and_video(one, tmp_path):
    env = native(one, 2, flat=True, invalid_action="resample", render_mode="rgb_array")
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
    settings = {**one.settings, "invalid_action": "resample", "normalise": True, "flat": False}
    name = f"servegym:{one.env_id}"  # a new process registers the environments by this
    env = make_vec_env(name, n_envs=2, env_kwargs=settings, vec_env_cls=SubprocVecEnv)
    A2C("MultiInputPolicy", env, **QUIET).learn(20)
    env.close()
