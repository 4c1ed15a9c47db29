"""Environments are brought to where they were, in the middle of their episodes."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

import servegym
from servegym.train.places import Places


def make(path: str, num_requests: int) -> gymnasium.vector.VectorEnv:
    assert servegym.__version__  # importing servegym registers the environments
    return gymnasium.make_vec(
        "servegym/Dispatch-v1",
        num_envs=3,
        scenario=path,
        num_requests=num_requests,
        load=(0.6, 1.1),
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )


@pytest.mark.parametrize(
    ("num_requests", "steps"), [(40, 100), (600, 300)], ids=["many episodes", "a long one"]
)
def test_environments_go_on_as_if_they_had_not_stopped(write_scenario, num_requests, steps):
    path = write_scenario(disturbances={"step_noise_sigma": 0.2})
    rng = np.random.default_rng(0)
    env = make(path, num_requests)
    _, info = env.reset(seed=7)
    places = Places.at_the_beginning(3)
    for step in range(steps):
        action = (rng.random(info["action_mask"].shape) * info["action_mask"]).argmax(-1)
        if step == steps // 2:  # by way of what a checkpoint holds
            places = Places(places.episodes.copy(), places.taken())
        observation, _, terminated, _, info = env.step(action)
        places.note(action, terminated)
    other = make(path, num_requests)
    other.reset(seed=7)
    places.go_to(other.batch)
    again = other.batch.observation()
    for key, value in observation.items():
        np.testing.assert_array_equal(again[key], value)
    assert places.episodes.max() == (2 if num_requests == 40 else 0)
    for _ in range(60):
        action = info["action_mask"].argmax(-1)
        want, got = env.step(action), other.step(action)
        for key, value in want[0].items():
            np.testing.assert_array_equal(got[0][key], value)
        for part in (1, 2):
            np.testing.assert_array_equal(got[part], want[part])
        info = want[4]
