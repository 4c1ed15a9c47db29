"""The hyperparameters in rl-zoo3's form name environments and settings that exist."""

from __future__ import annotations

import inspect
from pathlib import Path

import gymnasium
import pytest
import yaml

sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")

FILES = Path(__file__).resolve().parent.parent / "examples" / "rl-zoo3"
ALGORITHMS = {"a2c": [sb3.A2C], "ppo": [sb3.PPO, contrib.MaskablePPO]}
#: What rl-zoo3 takes out of an entry before the rest makes the model.
OF_THE_ZOO = {"n_envs", "n_timesteps"}


def read(name: str) -> dict[str, dict]:
    return yaml.safe_load((FILES / f"{name}.yml").read_text())


def test_every_file_is_of_a_known_algorithm():
    assert {path.stem for path in FILES.glob("*.yml")} == ALGORITHMS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_numbers_are_numbers(name):
    # YAML 1.1 takes 1e-3 for a text
    found = read(name)
    assert found
    for env_id, given in found.items():
        texts = {key for key, value in given.items() if isinstance(value, str)}
        assert texts == {"policy"}, env_id
        assert given["n_timesteps"] >= 1e5


@pytest.mark.parametrize("name", ALGORITHMS)
def test_hyperparameters_make_a_model(name):
    from servegym.envs.sb3 import make_vec

    found = read(name)
    assert found
    for env_id, given in found.items():
        assert env_id in gymnasium.registry
        own = {"num_requests": 32} if "Dispatch" in env_id else {}
        envs = make_vec(env_id, given["n_envs"], **own)
        rest = {key: value for key, value in given.items() if key not in OF_THE_ZOO}
        for algorithm in ALGORITHMS[name]:
            known = inspect.signature(algorithm).parameters
            assert rest.keys() <= known.keys(), (env_id, algorithm)
            model = algorithm(env=envs, device="cpu", seed=0, **rest)
            for key in rest.keys() - {"policy", "clip_range"}:
                assert getattr(model, key) == rest[key]
            if "clip_range" in rest:
                assert model.clip_range(1.0) == rest["clip_range"]
            if "batch_size" in rest:  # no minibatch is cut short
                assert given["n_envs"] * rest["n_steps"] % rest["batch_size"] == 0
        envs.close()


def test_tuned_settings_learn():
    from servegym.envs.sb3 import make_vec

    given = read("ppo")["servegym/DispatchShaped-v1"]
    rest = {key: value for key, value in given.items() if key not in OF_THE_ZOO}
    envs = make_vec("servegym/DispatchShaped-v1", given["n_envs"], num_requests=64)
    model = contrib.MaskablePPO(env=envs, device="cpu", seed=0, **rest)
    before = [weights.clone() for weights in model.policy.parameters()]
    model.learn(1)  # one update
    assert model.num_timesteps == given["n_envs"] * rest["n_steps"]
    moved = [
        bool((old != new).any()) for old, new in zip(before, model.policy.parameters(), strict=True)
    ]
    assert all(moved)
    envs.close()
