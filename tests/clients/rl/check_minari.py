"""Minari: record episodes with their infos, load them, play them again."""

from __future__ import annotations

import gymnasium
import minari
import numpy as np
import pytest


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_round_trip(case, data_format, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = minari.DataCollector(case.make(), record_infos=True, data_format=data_format)
    for seed in range(2):
        env.reset(seed=seed)
        done = False
        while not done:
            _, _, done, _, info = env.step(env.unwrapped.action_space.sample())
    env.create_dataset("servegym/random-v0", eval_env=case.env_id)
    dataset = minari.load_dataset("servegym/random-v0")
    assert dataset.total_episodes == 2
    replay = dataset.recover_environment()
    assert isinstance(replay, gymnasium.Env)
    for episode in dataset:
        observation, _ = replay.reset(seed=int(episode.seed))
        for step, action in enumerate(episode.actions):
            for name, value in observation.items():
                np.testing.assert_array_equal(episode.observations[name][step], value)
            observation, reward, done, _, info = replay.step(action)
            assert episode.rewards[step] == reward
            assert episode.infos["dt_s"][step + 1] == info["dt_s"]
        assert done
        for name, value in info["episode_metrics"].items():
            assert episode.infos["episode_metrics"][name][-1] == value
