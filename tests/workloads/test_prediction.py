"""Length predictors err as much as they say."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.workloads.prediction import PredictorConfig


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_lognormal_sigma_is_the_deviation_of_the_log_error(sigma):
    truth = np.geomspace(500, 50_000, 40_000).astype(np.int32)
    predicted = PredictorConfig(sigma=sigma).predict(rng(), truth)
    error = np.log(predicted / truth)
    # standard errors: sigma / sqrt(2 * 40,000) = 0.35 % of sigma, and sigma / 200 for the mean
    assert error.std() == pytest.approx(sigma, rel=0.02)
    assert error.mean() == pytest.approx(0.0, abs=0.02 * sigma)


def test_lognormal_errors_do_not_depend_on_the_length():
    truth = np.repeat(np.array([500, 50_000], np.int32), 20_000)
    error = np.log(PredictorConfig(sigma=0.5).predict(rng(), truth) / truth)
    assert error[:20_000].std() == pytest.approx(error[20_000:].std(), rel=0.03)


def bucket(truth, x, num_buckets):
    edges = np.quantile(truth, np.arange(1, num_buckets) / num_buckets)
    return np.searchsorted(edges, x, side="right")


@pytest.mark.parametrize("num_buckets", [2, 4, 10])
@pytest.mark.parametrize("accuracy", [0.0, 0.4, 0.7, 1.0])
def test_the_right_bucket_is_named_as_often_as_asked(num_buckets, accuracy):
    truth = rng(1).integers(10, 100_000, 20_000).astype(np.int32)
    config = PredictorConfig(kind="bucket", num_buckets=num_buckets, accuracy=accuracy)
    predicted = config.predict(rng(), truth)
    right = bucket(truth, predicted, num_buckets) == bucket(truth, truth, num_buckets)
    assert right.mean() == pytest.approx(accuracy, abs=0.015)


def test_a_wrong_bucket_is_a_neighbour():
    truth = rng(1).integers(10, 100_000, 20_000).astype(np.int32)
    predicted = PredictorConfig(kind="bucket", accuracy=0.5, num_buckets=10).predict(rng(), truth)
    off = bucket(truth, predicted, 10) - bucket(truth, truth, 10)
    assert set(off.tolist()) == {-1, 0, 1}


def test_a_bucket_answers_its_median():
    truth = np.arange(1, 101, dtype=np.int32)
    predicted = PredictorConfig(kind="bucket", accuracy=1.0, num_buckets=2).predict(rng(), truth)
    # quartiles of 1..100: 1 + 99 / 4 and 1 + 3 * 99 / 4
    assert predicted[:50] == pytest.approx(25.75)
    assert predicted[50:] == pytest.approx(75.25)


def test_mean_knows_the_average_alone():
    truth = np.array([10, 20, 60], np.int32)
    assert PredictorConfig(kind="mean").predict(rng(), truth).tolist() == [30.0] * 3


def test_perfect_is_the_truth():
    truth = np.array([1, 20, 60], np.int32)
    assert PredictorConfig(kind="perfect").predict(rng(), truth).tolist() == [1.0, 20.0, 60.0]


def test_no_prediction_is_below_one_token():
    truth = np.ones(2000, np.int32)
    predicted = PredictorConfig(sigma=1.0).predict(rng(), truth)
    assert predicted.min() == 1.0
    assert predicted.max() > 2.0


@pytest.mark.parametrize("kind", ["lognormal", "bucket"])
def test_a_seed_gives_one_prediction(kind):
    truth = np.arange(1, 1001, dtype=np.int32)
    config = PredictorConfig(kind=kind)
    first, again, other = (config.predict(rng(seed), truth) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert (first != other).any()
