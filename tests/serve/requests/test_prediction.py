"""Output lengths are predicted from the nearest group that has answers enough."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.serve.requests.prediction import LengthPrediction, LengthPredictor


def make(**settings) -> LengthPredictor:
    return LengthPredictor(LengthPrediction(**({"min_answers": 2} | settings)))


def test_nothing_known_is_the_initial_guess_within_what_the_client_allows():
    assert make().predict("a", 0) == 256
    assert make().predict("a", 0, 100) == 100
    assert make().predict("a", 0, 0) == 1


def test_the_mean_of_tenant_and_class_then_of_the_class_then_of_all():
    predictor = make()
    for length in (10, 20):
        predictor.learn("a", 0, length)
    for length in (100, 200):
        predictor.learn("b", 0, length)
    assert predictor.predict("a", 0) == 15
    assert predictor.predict("b", 0) == 150
    assert predictor.predict("c", 0) == pytest.approx(82.5)
    predictor.learn("c", 0, 1)  # one answer is too few
    assert predictor.predict("c", 0) == pytest.approx(331 / 5)
    assert predictor.predict("a", 1) == pytest.approx(331 / 5)
    assert predictor.predict("b", 0, 30) == 30


def test_the_mean_moves():
    predictor = make(weight=0.5)
    for length in (10, 10, 10, 20):
        predictor.learn("a", 0, length)
    assert predictor.predict("a", 0) == 15


def test_max_tokens_is_taken_at_its_word():
    predictor = make(kind="max-tokens")
    for _ in range(5):
        predictor.learn("a", 0, 10)
    assert predictor.predict("a", 0, 500) == 500
    assert predictor.predict("a", 0) == 10


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_quantile_is_approached(quantile):
    predictor = make(kind="quantile", quantile=quantile, weight=0.01)
    lengths = np.random.default_rng(0).lognormal(4.0, 0.6, 20_000).astype(int) + 1
    for length in lengths.tolist():
        predictor.learn("a", 0, length)
    got = predictor.predict("a", 0)
    assert abs((lengths <= got).mean() - quantile) < 0.05


def test_only_so_many_groups_are_remembered():
    predictor = make(max_groups=10)
    for tenant in range(100):
        predictor.learn(str(tenant), 0, 7)
    assert len(predictor._groups) <= 10
    assert predictor.predict("none of these", 0) == 7


def test_numbers_of_any_size_are_no_trouble():
    predictor = LengthPredictor(LengthPrediction(kind="max-tokens", min_answers=1))
    assert 1e9 < predictor.predict("a", 0, 10**400) < 1e10
    predictor = LengthPredictor(LengthPrediction(min_answers=1))
    predictor.learn("a", 0, 10**400)
    assert 1e9 < predictor.predict("a", 0, 10**400) < 1e10
