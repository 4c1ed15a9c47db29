"""The simulator takes the logged decisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.replay.conditions import conditions
from servegym.replay.fleet import scenario_fleet
from servegym.replay.forced import Factors, Forced
from servegym.replay.log import read_log

from .live import play_live, scenario, slower
from .reading import load


def test_a_fleet_as_its_model_says_is_predicted_to_the_microsecond(exact):
    _, forced, observed = load(exact)
    [made] = forced.play([Factors.ones(3)])
    np.testing.assert_allclose(made.ttft_s, observed.ttft_s, atol=2e-6)
    np.testing.assert_allclose(made.e2e_s, observed.e2e_s, atol=2e-6)


def test_the_true_factors_predict_a_distorted_fleet(tmp_path):
    truth = np.array([[[1.3, 1.5, 0.8], [1.0, 1.0, 1.0], [1.0, 0.5, 2.0]]])
    distorted = {r: slower(*truth[0, r]) for r in range(3)}
    play_live(tmp_path, scenario(), num_requests=300, distorted=distorted)
    _, forced, observed = load(tmp_path)
    made, wrong = forced.play([Factors(np.zeros(0), truth), Factors.ones(3)])
    np.testing.assert_allclose(made.e2e_s, observed.e2e_s, atol=2e-6)
    assert abs(wrong.e2e_s / observed.e2e_s - 1).max() > 0.2


def test_costs_change_at_an_edge(tmp_path):
    play_live(tmp_path, scenario(), num_requests=400, distorted={1: slower(1.3, 1.3)}, from_s=15.0)
    _, forced, observed = load(tmp_path)
    values = np.ones((2, 3, 3))
    values[1, 1] = [1.3, 1.3, 1.0]
    [made] = forced.play([Factors(np.array([15.0 - first_dispatch(tmp_path)]), values)])
    # a stretch of decodes in progress at the edge ends differently here and there
    assert np.median(abs(made.e2e_s / observed.e2e_s - 1)) < 1e-4
    assert made.e2e_s.mean() == pytest.approx(observed.e2e_s.mean(), rel=1e-3)


def first_dispatch(folder):
    log = read_log([folder], scenario_fleet(scenario()))
    return float(scenario().episode(5, num_requests=400).table.arrival_s[0] + log.dispatch_s[0])


def test_cancelled_requests_occupy_their_replica_but_are_not_compared(tmp_path):
    play_live(
        tmp_path, scenario(), num_requests=300, end=lambda i: "cancelled" if i % 3 == 0 else None
    )
    log, forced, observed = load(tmp_path)
    assert len(forced) == 300
    assert observed.usable.sum() == log.counts()["finished"] == 200


def test_requests_that_do_not_fit_are_left_out_and_counted(exact):
    fleet = scenario_fleet(scenario())
    small = tuple(replace(t, num_blocks=60) for t in fleet.types)
    log = read_log([exact], replace(fleet, types=small))
    forced = Forced.of(log)
    need = log.table.prompt_tokens + log.table.output_tokens
    assert forced.num_unfit == (need > 960).sum() > 0
    assert len(forced) + forced.num_unfit == len(log)
    assert np.isfinite(forced.play([Factors.ones(3)])[0].e2e_s).all()


def test_conditions_count_what_decodes_beside_a_request(exact):
    _, forced, observed = load(exact)
    met = conditions(forced, observed.ttft_s, observed.e2e_s, np.zeros(len(forced)))
    begin, end = observed.at_s + observed.ttft_s, observed.at_s + observed.e2e_s
    for i in range(100, 110):
        alike = forced.actions == forced.actions[i]
        both = np.minimum(end[alike], end[i]) - np.maximum(begin[alike], begin[i])
        mean = both.clip(0.0).sum() / max(end[i] - begin[i], 1e-9)
        assert met.batch[i] == pytest.approx(max(mean, 1.0), rel=1e-6)
    np.testing.assert_allclose(met.shares.sum(axis=2), 1.0)
