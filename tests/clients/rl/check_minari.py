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
    for number in range(2):
        # the second one goes on in the sequence of the first
        env.reset(seed=5) if number == 0 else env.reset(options={"minari_autoseed": False})
        done = False
        while not done:
            _, _, done, _, info = env.step(env.unwrapped.action_space.sample())
    env.create_dataset("servegym/random-v0", eval_env=case.env_id)
    dataset = minari.load_dataset("servegym/random-v0")
    assert dataset.total_episodes == 2
    replay = dataset.recover_environment()
    assert isinstance(replay, gymnasium.Env)
    metadata = list(dataset.storage.get_episode_metadata(range(2)))
    assert [row.get("seed") for row in metadata] == [5, None]
    for episode, row in zip(dataset, metadata, strict=True):
        observation, _ = replay.reset(seed=row.get("seed"))
        for step, action in enumerate(episode.actions):
            seen = observation if isinstance(observation, dict) else {None: observation}
            for name, value in seen.items():
                recorded = episode.observations if name is None else episode.observations[name]
                np.testing.assert_array_equal(recorded[step], value)
            observation, reward, done, _, info = replay.step(action)
            assert episode.rewards[step] == reward
            assert episode.infos["dt_s"][step + 1] == info["dt_s"]
        assert done
        metrics = episode.infos["episode_metrics"]  # Arrow: a dict for each step
        for name, value in info["episode_metrics"].items():
            last = metrics[name][-1] if isinstance(metrics, dict) else metrics[-1][name]
            assert last == value
