"""Gymnasium's checker, autoreset, wrappers and video recorder."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.performance import benchmark_step
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as vector_wrappers


@pytest.mark.parametrize("settings", [{}, {"flat": True, "normalise": True}])
def test_checker(case, settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = case.make(**settings, render_mode="rgb_array")
        check_env(env.unwrapped)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_form(case, mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = case.make_vec(2, autoreset_mode=mode)
    assert env.unwrapped.autoreset_mode is mode
    observation, _ = env.reset(seed=0)
    ends = 0
    for _ in range(400):
        assert observation in env.observation_space
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert reward.dtype == np.float64
        over = terminated | truncated
        ends += int(over.sum())
        if mode is AutoresetMode.DISABLED and over.any():
            observation, _ = env.reset(options={"reset_mask": over})
        if ends >= 3:
            return
    raise AssertionError("no episode ended in 400 steps")


def test_wrappers(one):
    env = one.make_vec(2, flat=True, normalise=True)
    env = vector_wrappers.RecordEpisodeStatistics(env)
    env = vector_wrappers.NormalizeReward(vector_wrappers.ClipReward(env, -100.0, 100.0))
    env = vector_wrappers.RescaleObservation(env, -1.0, 1.0)
    env.reset(seed=0)
    for _ in range(300):
        observation, *_, info = env.step(env.action_space.sample())
        assert np.abs(observation).max() <= 1.0
        if "episode" in info:
            return
    raise AssertionError("no episode ended in 300 steps")


def test_video(one, tmp_path):
    env = gymnasium.wrappers.RecordVideo(
        one.make(render_mode="rgb_array"), str(tmp_path), episode_trigger=lambda n: True
    )
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.unwrapped.action_space.sample())
    env.close()
    assert [path.stat().st_size > 1000 for path in tmp_path.glob("*.mp4")] == [True]


def test_steps_are_counted(one):
    assert benchmark_step(one.make(invalid_action="resample"), target_duration=1, seed=0) > 10
