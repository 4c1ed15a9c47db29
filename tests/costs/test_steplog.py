"""Fits to engine step logs: exact on a noise-free log, never negative, honest about their error."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.costs.steplog import fit_step_log
from servegym.errors import ConfigError


def log(seed=0, steps=200):
    rng = np.random.default_rng(seed)
    prefill = rng.integers(0, 2048, steps) * (rng.random(steps) < 0.3)
    sequences = rng.integers(1, 128, steps)
    return prefill, sequences, sequences * rng.integers(100, 4000, steps)


def test_a_log_without_noise_gives_its_coefficients_back():
    prefill, sequences, kv = log()
    fit = fit_step_log(prefill, sequences, kv, 6e-3 + 2e-5 * prefill + 3e-5 * sequences + 4e-8 * kv)
    assert fit.overhead_s == pytest.approx(6e-3)
    assert fit.s_per_prefill_token == pytest.approx(2e-5)
    assert fit.s_per_sequence == pytest.approx(3e-5)
    assert fit.s_per_kv_token == pytest.approx(4e-8)
    assert fit.error == (0.0, 0.0)
    assert fit.step_s(100, 10, 10_000) == pytest.approx(6e-3 + 2e-3 + 3e-4 + 4e-4)


def test_the_error_is_that_of_the_steps_not_fitted_on():
    prefill, sequences, kv = log()
    seconds = 6e-3 + 2e-5 * prefill + 4e-8 * kv
    seconds[1::2] *= 1.1  # the half that the fit does not see is 10 % slower: 1 - 1/1.1
    assert fit_step_log(prefill, sequences, kv, seconds).error == pytest.approx((9.1, 9.1))


def test_a_term_that_would_be_negative_is_left_out():
    prefill, sequences, kv = log()
    seconds = 8e-3 + 2e-5 * prefill + 4e-8 * kv - 2e-5 * sequences
    fit = fit_step_log(prefill, sequences, kv, seconds)
    assert fit.s_per_sequence == 0.0
    assert min(fit.overhead_s, fit.s_per_prefill_token, fit.s_per_kv_token) > 0


def test_noise_of_5_percent_moves_predictions_by_less_than_4_percent():
    prefill, sequences, kv = log(steps=400)
    true = 6e-3 + 2e-5 * prefill + 3e-5 * sequences + 4e-8 * kv
    noisy = true * np.random.default_rng(1).lognormal(0.0, 0.05, len(true))
    fit = fit_step_log(prefill, sequences, kv, noisy)
    assert fit.step_s(prefill, sequences, kv) == pytest.approx(true, rel=0.04)
    # the median of |noise| of 5 % is 0.67 * 5 %
    assert fit.error[0] == pytest.approx(3.4, abs=0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c, t: (a[:5], b[:5], c[:5], t[:5]), "at least 20 steps, got 5"),
        (lambda a, b, c, t: (a[1:], b, c, t), "the same length"),
        (lambda a, b, c, t: (a, b, -c, t), "counts from 0"),
        (lambda a, b, c, t: (a, b, c, 0 * t), "durations above 0 s"),
    ],
)
def test_a_log_that_cannot_be_fitted_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        fit_step_log(*change(*log(), np.ones(200)))
