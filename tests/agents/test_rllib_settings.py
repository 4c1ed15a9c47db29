"""What is said of RLlib without it; what it does is in tests/clients/rl."""

from __future__ import annotations

import sys

import pytest

from servegym.cli import main
from servegym.errors import ConfigError
from servegym.train.registry import LEARNERS
from servegym.train.rllib_settings import RllibTraining


@pytest.fixture
def without_ray(monkeypatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "servegym.train.rllib", raising=False)
    monkeypatch.delitem(sys.modules, "servegym.agents.rllib_module", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)


def test_the_learner_says_what_it_lacks(without_ray):
    with pytest.raises(ConfigError, match=r"rllib needs ray: pip install -e '.\[ray\]'"):
        LEARNERS["dispatch"]["rllib"].trainer  # a property


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--ray needs ray: pip install -e '.[ray]'"),
        (["--bound"], "--bound is not spread over a cluster by --ray: leave it out"),
    ],
)
def test_an_evaluation_over_a_cluster_says_what_it_lacks(without_ray, capsys, words, said):
    with pytest.raises(SystemExit):
        main(["evaluate", "--policies", "random", "--ray", *words])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"algorithm": "dqn"}, "algorithm must be one of ppo, appo, impala, got 'dqn'"),
        ({"algorithm": "impala", "num_env_runners": 0}, "must be at least 1 for impala, got 0"),
        ({"minibatch": 10_000}, r"minibatch must be at most decisions_per_update \(8192\)"),
        ({"total_decisions": 100}, "total_decisions must be at least decisions_per_update"),
        ({"num_envs": 0}, "num_envs must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(setting, said):
    with pytest.raises(ConfigError, match=said):
        RllibTraining(**setting)
