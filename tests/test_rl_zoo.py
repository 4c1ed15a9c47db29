"""The hyperparameters in rl-zoo3's form name environments and settings that exist."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest
import yaml

sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")

FILES = Path(__file__).resolve().parent.parent / "examples" / "rl-zoo3"
ALGORITHMS = {"a2c": [sb3.A2C], "ppo": [sb3.PPO, contrib.MaskablePPO]}


def test_every_file_is_of_a_known_algorithm():
    assert {path.stem for path in FILES.glob("*.yml")} == ALGORITHMS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_hyperparameters_make_a_model(name):
    from servegym.envs.sb3 import make_vec

    settings = yaml.safe_load((FILES / f"{name}.yml").read_text())
    assert settings
    for env_id, given in settings.items():
        assert env_id in gymnasium.registry
        assert given.pop("n_timesteps") >= 1e5
        envs = make_vec(env_id, given.pop("n_envs"), num_requests=32)
        for algorithm in ALGORITHMS[name]:
            model = algorithm(given["policy"], envs, device="cpu", seed=0)
            assert given.keys() == {"policy"}  # the rest is stock, as the file says
            assert model.num_timesteps == 0
