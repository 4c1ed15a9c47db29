"""Lengths given predictions: what is drawn is what came true for such predictions."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.policy.drawn_lengths import Lengths, draw_output, learn_lengths, lengths_of
from servegym.scenario import Scenario, load_scenario
from servegym.workloads.prediction import PredictorConfig


def drawn(lengths: Lengths, predicted: float, generated: int = 0, num: int = 400) -> np.ndarray:
    shares = (np.arange(num) + 0.5) / num
    return np.array([draw_output(lengths, predicted, generated, u) for u in shares])


def test_a_perfect_prediction_is_the_length():
    truth = np.random.default_rng(0).integers(1, 900, 2000).astype(float)
    lengths = lengths_of(truth, truth)
    for predicted in (1, 37, 899):
        assert set(drawn(lengths, float(predicted))) == {predicted}


def test_a_length_is_drawn_from_those_of_like_predictions():
    # of predictions of 10 half came true as 5 and half as 20, of those of 100 all as 100
    predicted = np.repeat([10.0, 100.0], 64)
    output = np.concatenate([np.tile([5.0, 20.0], 32), np.full(64, 100.0)])
    lengths = lengths_of(predicted, output)
    got, count = np.unique(drawn(lengths, 10.0), return_counts=True)
    assert got.tolist() == [5, 20]
    assert count.tolist() == [200, 200]
    assert set(drawn(lengths, 100.0)) == {100}


def test_what_is_out_is_shorter_than_what_is_drawn():
    lengths = lengths_of(np.full(64, 10.0), np.tile([5.0, 20.0], 32))
    assert set(drawn(lengths, 10.0, generated=4)) == {5, 20}
    assert set(drawn(lengths, 10.0, generated=5)) == {20}
    assert set(drawn(lengths, 10.0, generated=20)) == {21}  # longer than any that was seen


@pytest.mark.parametrize("generated", [0, 150])
def test_lengths_are_distributed_as_bayes_says_where_there_is_a_formula(generated):
    # log T ~ N(5, 0.8^2), predicted T exp(0.5 z): log T given p is N(5 + k (log p - 5), k 0.5^2)
    # with k = 0.64 / (0.64 + 0.25); given that more than `generated` are out, cut off there
    rng = np.random.default_rng(1)
    output = np.exp(5.0 + 0.8 * rng.standard_normal(100_000))
    lengths = lengths_of(output * np.exp(0.5 * rng.standard_normal(100_000)), output)
    k = 0.64 / 0.89
    for predicted in (60.0, 148.4, 400.0):
        center = 5.0 + k * (np.log(predicted) - 5.0)
        exact = np.exp(center + np.sqrt(k) * 0.5 * rng.standard_normal(100_000))
        exact = exact[exact > generated]
        got = drawn(lengths, predicted, generated)
        for share in (0.1, 0.5, 0.9):
            want = np.quantile(exact, share)
            assert np.quantile(got, share) == pytest.approx(want, rel=0.06, abs=2.0)


def test_a_scenario_says_what_its_predictions_are_worth():
    scenario = load_scenario("azure-conv-fit")

    def under(kind: str) -> Scenario:
        predictor = PredictorConfig(kind=kind)
        trouble = scenario.disturbances.model_copy(update={"predictor": predictor})
        return scenario.model_copy(update={"disturbances": trouble})

    assert set(drawn(learn_lengths(under("perfect")), 40.0)) == {40}
    table = under("mean").episode(1).table
    got = drawn(learn_lengths(under("mean")), float(table.predicted_output_tokens[0]))
    for share in (0.2, 0.5, 0.8):
        want = np.quantile(table.output_tokens, share)
        assert np.quantile(got, share) == pytest.approx(want, rel=0.15)
