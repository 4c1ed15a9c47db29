"""TorchRL's checker of specs, over single and vector environments."""

from __future__ import annotations

import pytest
from torchrl.envs import GymEnv, GymWrapper
from torchrl.envs.utils import check_env_specs

import servegym  # noqa: F401 - registers the environments


@pytest.mark.parametrize("settings", [{}, {"flat": True, "normalise": True}])
def test_single(case, settings):
    env = GymEnv(case.env_id, **case.settings, **settings, invalid_action="resample")
    check_env_specs(env, seed=0)
    env.close()


@pytest.mark.parametrize("settings", [{}, {"flat": True, "normalise": True}])
def test_vector(case, settings):
    # the mode it prefers; under SAME_STEP it refuses a dict among the infos, of any environment
    env = GymWrapper(
        case.make_vec(2, **settings, invalid_action="resample", autoreset_mode="Disabled")
    )
    assert env.batch_size == (2,)
    check_env_specs(env, seed=0)
    rollout = env.rollout(100, break_when_any_done=False)
    assert rollout.shape == (2, 100)
    env.close()
