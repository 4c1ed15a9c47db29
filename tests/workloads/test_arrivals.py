"""Arrival processes have the rate and the variability they are asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.workloads import arrivals
from servegym.workloads.config import ArrivalConfig

KINDS = ("poisson", "gamma", "weibull", "bursts", "diurnal")


def rng(seed=0):
    return np.random.default_rng(seed)


def rate(times):
    return (len(times) - 1) / (times[-1] - times[0])


def cv(times):
    gaps = np.diff(times)
    return gaps.std() / gaps.mean()


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_are_as_many_as_asked_and_ascend_from_0(kind):
    times = ArrivalConfig(kind=kind, cv=2.0).draw(rng(), 1000, 8.0)
    assert times.shape == (1000,)
    assert times.dtype == np.float64
    assert times[0] >= 0
    assert (np.diff(times) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_stream(kind):
    config = ArrivalConfig(kind=kind, cv=2.0)
    first, again, other = (config.draw(rng(seed), 200, 8.0) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert not np.isclose(first, other).any()


def test_poisson_gaps_are_exponential():
    times = arrivals.poisson(rng(), 40_000, 8.0)
    # of 40,000 gaps the mean is off by 0.5 % (one standard error), the CV by about as much
    assert rate(times) == pytest.approx(8.0, rel=0.02)
    assert cv(times) == pytest.approx(1.0, rel=0.02)
    # P(gap > mean) = 1/e
    assert (np.diff(times) > 1 / 8).mean() == pytest.approx(math.exp(-1), abs=0.01)


@pytest.mark.parametrize("draw", [arrivals.gamma, arrivals.weibull])
@pytest.mark.parametrize("wanted", [0.3, 1.0, 2.5])
def test_renewal_gaps_have_the_rate_and_cv_asked_for(draw, wanted):
    times = draw(rng(), 60_000, 8.0, wanted)
    # standard error of the mean: 2.5 / sqrt(60,000) = 1 %
    assert rate(times) == pytest.approx(8.0, rel=0.04)
    assert cv(times) == pytest.approx(wanted, rel=0.08)


def test_gamma_and_weibull_of_cv_1_are_exponential():
    for draw in (arrivals.gamma, arrivals.weibull):
        gaps = np.diff(draw(rng(), 40_000, 8.0, 1.0))
        assert (gaps > 1 / 8).mean() == pytest.approx(math.exp(-1), abs=0.01)


def test_bursts_have_the_rate_and_cv_of_their_markov_chain():
    times = arrivals.bursts(rng(), 200_000, 20.0, ratio=5.0, period_s=10.0, share=0.25)
    # calm rate a = 20 / (1 + 0.25 * 4) = 10, burst rate b = 50; mean stays of 7.5 s and 2.5 s, so
    # the chain leaves them at u = 1 / 7.5 and v = 1 / 2.5 a second
    # cv^2 = 1 + 2 u v (a - b)^2 / ((u + v)^2 (a b + a v + b u))     (Fischer, Meier-Hellstern 1993)
    #      = 1 + 2 * 0.05333 * 1600 / (0.28444 * 510.67) = 2.175
    assert rate(times) == pytest.approx(20.0, rel=0.06)
    assert cv(times) ** 2 == pytest.approx(2.175, rel=0.06)


def test_bursts_of_ratio_1_are_poisson():
    times = arrivals.bursts(rng(), 40_000, 20.0, ratio=1.0, period_s=10.0, share=0.25)
    assert rate(times) == pytest.approx(20.0, rel=0.02)
    assert cv(times) == pytest.approx(1.0, rel=0.02)


def test_bursts_cluster_arrivals_over_seconds():
    times = arrivals.bursts(rng(), 100_000, 20.0, ratio=5.0, period_s=10.0, share=0.25)
    counts = np.histogram(times, bins=np.arange(0.0, times[-1], 1.0))[0]
    # Poisson counts have variance = mean. Here the rate itself varies with 0.25 * 0.75 * 40^2 =
    # 300; over a second it decorrelates at u + v = 0.533, which keeps the share
    # 2 (x - 1 + exp(-x)) / x^2 = 0.841 at x = 0.533: index = 1 + 0.841 * 300 / 20 = 13.6
    assert counts.var() / counts.mean() == pytest.approx(13.6, rel=0.1)


def test_diurnal_rate_swings_with_the_sine():
    times = arrivals.diurnal(rng(), 100_000, 50.0, amplitude=0.8, period_s=100.0)
    phase = (times % 100.0) / 100.0
    # mean of 1 + 0.8 sin over the first half period: 1 + 1.6 / pi = 1.509, so 75.5 % of arrivals
    assert (phase < 0.5).mean() == pytest.approx(0.5 + 0.8 / math.pi, abs=0.01)
    # over the eighths around the peak: 1 + 0.8 * 4 / pi * sin(pi / 4) = 1.720, a quarter of time
    peak = ((phase > 0.125) & (phase < 0.375)).mean()
    assert peak == pytest.approx(0.25 * 1.720, abs=0.01)
    assert rate(times[times < 1900.0]) == pytest.approx(50.0, rel=0.02)  # 19 whole periods


def test_diurnal_without_amplitude_is_poisson():
    times = arrivals.diurnal(rng(), 40_000, 50.0, amplitude=0.0, period_s=100.0)
    assert rate(times) == pytest.approx(50.0, rel=0.02)
    assert cv(times) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("kind", ["poisson", "gamma", "weibull"])
def test_twice_the_rate_is_the_same_stream_in_half_the_time(kind):
    config = ArrivalConfig(kind=kind, cv=2.0)
    slow, fast = config.draw(rng(), 500, 4.0), config.draw(rng(), 500, 8.0)
    np.testing.assert_allclose(fast, slow / 2, rtol=1e-12)
