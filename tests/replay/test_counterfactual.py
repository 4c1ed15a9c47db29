"""Other policies on the same arrivals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from servegym.errors import ConfigError
from servegym.replay.compare import Figure
from servegym.replay.counterfactual import LOGGED, Arrivals, counterfactuals, deciding_policies
from servegym.replay.forced import Factors
from servegym.replay.tables import counterfactual_table

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


def test_what_the_simulator_may_be_wrong_about_is_said_beside_the_ratios(log):
    found = counterfactuals(log, ["least-outstanding", "mct-oracle"], Factors.ones(3))
    far, near = (one.ratio.value for one in found[1:])
    assert far != near
    error = Figure("all", "", "e2e_s", "mean", 2.0, 2.02, -0.005, 0.025, 400)  # 1 % too much
    tested = Figure("all", "", "e2e_s", "mean", 2.0, 1.9, -0.9, 0.1, 100)

    def table(figures, held_out=None):
        result = SimpleNamespace(
            arrivals=Arrivals.of(log, "open"),
            counterfactuals=found,
            corrected_figures=figures,
            held_out=held_out,
            unknown_policies=[],
        )
        made = counterfactual_table(result)
        return made.note, {row[0].split(" ")[0]: row[6] for row in made.rows}

    note, ratios = table([error])
    assert "is off by +1.0 % [-0.5, +2.5]" in note
    assert not any(ratio.endswith("?") for ratio in ratios.values())  # they are further from 1
    # of a part that was held out the error counts, and 90 % are more than any of them
    note, ratios = table([error], SimpleNamespace(after=[tested]))
    assert "is off by -5.0 % [-90.0, +10.0]" in note
    assert [ratio.endswith("?") for ratio in ratios.values()] == [False, True, True]
    note, ratios = table([])
    assert "cannot be seen from this log" in note
    assert not any(ratio.endswith("?") for ratio in ratios.values())


def test_an_unknown_policy_is_refused(log):
    with pytest.raises(ConfigError, match="round-robn"):
        counterfactuals(log, ["round-robn"], Factors.ones(3))
