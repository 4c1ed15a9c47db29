"""What is learnt of output lengths, against what the lengths were drawn from."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.cluster.state import NUM_LENGTH_SUMS
from servegym.policy.lengths import (
    error_of,
    expected_length,
    learn_length,
    spread_of,
    tokens_left,
)


def learnt(predicted, output):
    sums = np.zeros(NUM_LENGTH_SUMS)
    for x, y in zip(predicted, output, strict=True):
        learn_length(sums, x, y)
    return sums


def test_before_the_first_end_a_prediction_stands():
    error = error_of(np.zeros(NUM_LENGTH_SUMS))
    assert expected_length(123.0, error) == pytest.approx(123.0)
    assert spread_of(error[3]) == 0.0


def test_predictions_that_are_right_stay():
    lengths = np.geomspace(10, 1000, 50)
    error = error_of(learnt(lengths, lengths))
    assert expected_length(77.0, error) == pytest.approx(77.0)
    assert spread_of(error[3]) == pytest.approx(0.0, abs=1e-6)


def test_one_answer_of_twice_its_prediction_counts_against_twenty_that_were_right():
    error = error_of(learnt([100.0], [200.0]))
    assert expected_length(100.0, error) == pytest.approx(100.0 * 2 ** (1 / 21))


def test_the_mean_is_that_of_lengths_so_predicted():
    # ln L ~ N(5, 0.6^2), prediction L e^(0.5 z): the posterior of ln L has weight
    # 0.36 / (0.36 + 0.25) on the prediction and variance 0.36 * 0.25 / 0.61
    rng = np.random.default_rng(1)
    length = np.exp(5.0 + 0.6 * rng.standard_normal(40_000))
    predicted = length * np.exp(0.5 * rng.standard_normal(40_000))
    error = error_of(learnt(predicted, length))
    weight, variance = 0.36 / 0.61, 0.36 * 0.25 / 0.61
    assert error[3] == pytest.approx(variance, rel=0.1)
    for x in (50.0, 150.0, 600.0):
        want = math.exp(5.0 + weight * (math.log(x) - 5.0) + variance / 2)
        assert expected_length(x, error) == pytest.approx(want, rel=0.05)


def test_what_changes_is_forgotten():
    sums = learnt([100.0] * 3000, [200.0] * 3000)
    for _ in range(20_000):
        learn_length(sums, 100.0, 50.0)
    assert expected_length(100.0, error_of(sums)) == pytest.approx(50.0, rel=0.05)


def test_of_a_known_length_the_rest_is_left():
    assert tokens_left(100.0, 0.0, 30.0) == 70.0
    assert tokens_left(100.0, 0.0, 130.0) == 1.0


@pytest.mark.parametrize("tokens", [0, 20, 100, 400, 1000])
def test_what_is_left_is_the_mean_of_those_that_got_so_far(tokens):
    variance = 0.3
    rng = np.random.default_rng(2)
    length = 200.0 * np.exp(math.sqrt(variance) * rng.standard_normal(4_000_000) - variance / 2)
    longer = length[length > tokens]
    assert len(longer) > 20
    assert tokens_left(200.0, variance, tokens) == pytest.approx(
        (longer - tokens).mean(), rel=0.01 if tokens < 1000 else 0.1
    )


def test_what_is_left_is_finite_however_far_an_answer_has_come():
    left = [tokens_left(10.0, 0.1, tokens) for tokens in (1e2, 1e3, 1e4, 1e6)]
    assert all(1.0 <= x < 1e6 for x in left)
