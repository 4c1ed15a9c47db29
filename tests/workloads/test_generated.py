"""Generated streams: lengths, classes, tenants, load and seeds."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from pydantic import ValidationError

from servegym.workloads.config import ArrivalConfig, GeneratedConfig, SessionConfig
from servegym.workloads.mixtures import LengthConfig


def rng(seed=0):
    return np.random.default_rng(seed)


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


STREAMS = {
    "independent": GeneratedConfig(rate_rps=5.0),
    "bursts": GeneratedConfig(rate_rps=5.0, arrivals=ArrivalConfig(kind="bursts")),
    "sessions": GeneratedConfig(rate_rps=5.0, sessions=SessionConfig(), num_tenants=3),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_seed_gives_one_table(stream):
    draws = [STREAMS[stream].table(rng(seed), num_requests=100) for seed in (1, 1, 2)]
    assert same(draws[0], draws[1])
    assert not np.isclose(draws[0].arrival_s, draws[2].arrival_s).any()
    assert (draws[0].prompt_tokens != draws[2].prompt_tokens).any()


@pytest.mark.parametrize("stream", STREAMS)
def test_a_table_has_the_requests_asked_for_in_order(stream):
    table = STREAMS[stream].table(rng(), num_requests=137)
    assert len(table) == 137
    assert (np.diff(table.arrival_s) >= 0).all()


def test_load_makes_the_same_requests_come_faster():
    once = STREAMS["independent"].table(rng(), num_requests=200)
    twice = STREAMS["independent"].table(rng(), num_requests=200, load=2.0)
    np.testing.assert_allclose(twice.arrival_s, once.arrival_s / 2)
    assert np.array_equal(twice.prompt_tokens, once.prompt_tokens)
    assert np.array_equal(twice.output_tokens, once.output_tokens)


def test_lengths_are_lognormal():
    lengths = LengthConfig(medians_tokens=(2000.0,), sigmas=(0.5,), max_tokens=10**6)
    x = lengths.draw(rng(), 40_000)
    # standard errors: 0.25 % for the mean of the logarithm, 0.4 % for its deviation
    assert np.log(x).mean() == pytest.approx(math.log(2000), abs=0.01)
    assert np.log(x).std() == pytest.approx(0.5, rel=0.02)
    assert x.mean() == pytest.approx(2000 * math.exp(0.5**2 / 2), rel=0.02)  # 2266


def test_a_mixture_mixes_by_its_weights():
    lengths = LengthConfig(
        medians_tokens=(50.0, 5000.0), sigmas=(0.2, 0.1), weights=(3.0, 1.0), max_tokens=10**6
    )
    x = lengths.draw(rng(), 40_000)
    short = x < 500  # more than ten deviations from either median
    assert short.mean() == pytest.approx(0.75, abs=0.01)
    assert np.median(x[short]) == pytest.approx(50, rel=0.02)
    assert np.median(x[~short]) == pytest.approx(5000, rel=0.02)
    assert np.log(x[~short]).std() == pytest.approx(0.1, rel=0.05)


def test_lengths_stay_within_their_limits():
    lengths = LengthConfig(medians_tokens=(100.0,), sigmas=(2.0,), min_tokens=40, max_tokens=300)
    x = lengths.draw(rng(), 1000)
    assert (x.min(), x.max()) == (40, 300)
    # P(x >= 300) = P(z >= ln 3 / 2 = 0.549) = 0.291
    assert (x == 300).mean() == pytest.approx(0.291, abs=0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        {"medians_tokens": (10.0, 20.0)},  # with the one default sigma and weight
        {"medians_tokens": (10.0, 20.0), "sigmas": (1.0, 1.0), "weights": (1.0,)},
        {"medians_tokens": (), "sigmas": (), "weights": ()},
        {"medians_tokens": (-10.0,)},
        {"sigmas": (-0.5,)},
        {"medians_tokens": (1.0, 2.0), "sigmas": (1.0, 1.0), "weights": (-1.0, 2.0)},
        {"medians_tokens": (1.0, 2.0), "sigmas": (1.0, 1.0), "weights": (0.0, 0.0)},
        {"min_tokens": 100, "max_tokens": 10},
    ],
    ids=str,
)
def test_impossible_lengths_are_refused(wrong):
    with pytest.raises(ValidationError):
        LengthConfig(**wrong)


@pytest.mark.parametrize("shares", [(0.7, 0.3), (7, 3)])
def test_slo_classes_come_in_their_shares(shares):
    table = STREAMS["independent"].table(rng(), num_requests=20_000, class_shares=shares)
    assert np.bincount(table.slo_class) / 20_000 == pytest.approx([0.7, 0.3], abs=0.012)


def test_one_class_is_class_0():
    assert not STREAMS["independent"].table(rng(), num_requests=50).slo_class.any()


def test_tenants_share_a_stream_evenly():
    table = GeneratedConfig(rate_rps=5.0, num_tenants=4).table(rng(), num_requests=20_000)
    assert np.bincount(table.tenant) / 20_000 == pytest.approx([0.25] * 4, abs=0.012)


@pytest.mark.parametrize(
    "wrong",
    [{"rate_rps": 0.0}, {"rate_rps": -1.0}, {"rate_rps": math.inf}, {"rate_rps": 1, "speed": 2}],
    ids=str,
)
def test_impossible_streams_are_refused(wrong):
    with pytest.raises(ValidationError):
        GeneratedConfig(**wrong)
