"""Other policies on the same arrivals."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import ConfigError
from servegym.replay.counterfactual import LOGGED, counterfactuals, deciding_policies
from servegym.replay.forced import Factors

from .live import play_live, scenario
from .reading import load


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    play_live(folder, scenario(), num_requests=500, policy="round-robin")
    return load(folder)[0]


def test_the_policy_that_decided_is_found_and_decides_alike(log):
    assert deciding_policies(log) == (["round-robin"], [])
    logged, same = counterfactuals(log, ["round-robin"], Factors.ones(3))
    assert logged.policy == LOGGED
    assert logged.agreement == 1.0
    assert logged.ratio == (1.0, 1.0, 1.0)
    assert same.decided
    assert same.agreement == 1.0
    assert same.ratio.value == pytest.approx(1.0, abs=1e-9)
    rows = log.e2e_s[log.finished]
    assert logged.statistics["e2e_s", "mean"] == pytest.approx(rows.mean(), rel=1e-3)


def test_a_better_policy_is_better(log):
    _, better = counterfactuals(log, ["mct-oracle"], Factors.ones(3))
    assert not better.decided
    assert better.ratio.high < 1.0
    assert better.agreement < 0.9


def test_costs_that_changed_are_those_of_the_counterfactual(log):
    factors = Factors(np.array([10.0]), np.stack((np.ones((3, 3)), np.full((3, 3), 2.0))))
    slow, _ = counterfactuals(log, ["round-robin"], factors)
    plain, _ = counterfactuals(log, ["round-robin"], Factors.ones(3))
    assert slow.statistics["e2e_s", "mean"] > 1.5 * plain.statistics["e2e_s", "mean"]


def test_an_unknown_policy_is_refused(log):
    with pytest.raises(ConfigError, match="round-robn"):
        counterfactuals(log, ["round-robn"], Factors.ones(3))
