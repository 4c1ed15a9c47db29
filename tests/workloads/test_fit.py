"""A fit recovers the generator that a table was drawn from."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.config import ArrivalConfig, GeneratedConfig
from servegym.workloads.fit import QUANTILES, fit_quality, fit_workload
from servegym.workloads.mixtures import LengthConfig
from servegym.workloads.table import RequestTable

KNOWN = GeneratedConfig(
    rate_rps=12.0,
    arrivals=ArrivalConfig(kind="gamma", cv=1.8),
    prompt=LengthConfig(
        medians_tokens=(60.0, 2000.0), sigmas=(0.4, 0.5), weights=(0.6, 0.4), max_tokens=100_000
    ),
    output=LengthConfig(medians_tokens=(300.0,), sigmas=(0.7,), max_tokens=100_000),
)


@pytest.fixture(scope="module")
def table():
    return KNOWN.table(np.random.default_rng(5), num_requests=20_000)


@pytest.fixture(scope="module")
def fitted(table):
    return fit_workload(table)


def test_rate_and_gap_variability_are_recovered(fitted):
    # standard error of the mean gap: 1.8 / sqrt(20,000) = 1.3 %
    assert fitted.rate_rps == pytest.approx(12.0, rel=0.05)
    assert fitted.arrivals.kind == "gamma"
    assert fitted.arrivals.cv == pytest.approx(1.8, rel=0.05)


def test_both_parts_of_a_mixture_are_recovered(fitted):
    assert fitted.prompt.medians_tokens == pytest.approx((60.0, 2000.0), rel=0.05)
    assert fitted.prompt.sigmas == pytest.approx((0.4, 0.5), abs=0.05)
    assert fitted.prompt.weights == pytest.approx((0.6, 0.4), abs=0.02)


def test_quantiles_of_the_fit_are_those_of_the_table(table, fitted):
    rows = fit_quality(table, fitted)
    assert [row.quantity for row in rows] == ["gap_s", "prompt_tokens", "output_tokens"]
    for row in rows:
        low = QUANTILES.index(25)  # below, gaps of this CV are near 0 and relative errors large
        assert row.fit[low:] == pytest.approx(row.trace[low:], rel=0.12)
        assert row.kolmogorov < 0.03


def test_lengths_of_the_fit_stay_within_those_of_the_table(table, fitted):
    drawn = fitted.table(np.random.default_rng(1), num_requests=5000)
    assert drawn.output_tokens.min() >= table.output_tokens.min()
    assert drawn.output_tokens.max() <= table.output_tokens.max()


def constant(prompt):
    return LengthConfig(medians_tokens=(prompt,), sigmas=(0.0,))


@pytest.mark.parametrize(("fit_tokens", "distance"), [(100.0, 0.0), (200.0, 1.0)])
def test_kolmogorov_distance_is_0_of_equals_and_1_of_disjoint(fit_tokens, distance):
    table = RequestTable.build(np.arange(50.0), np.full(50, 100), np.full(50, 100))
    config = GeneratedConfig(rate_rps=1.0, prompt=constant(fit_tokens), output=constant(100.0))
    _, prompt, output = fit_quality(table, config)
    assert prompt.kolmogorov == distance
    assert prompt.trace == (100.0,) * 6
    assert prompt.fit == (fit_tokens,) * 6
    assert output.kolmogorov == 0.0


@pytest.mark.parametrize("arrivals", [[0.0], [3.0, 3.0, 3.0]], ids=["one request", "one instant"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_table_without_a_rate_cannot_be_fitted(arrivals):
    n = len(arrivals)
    table = RequestTable.build(np.array(arrivals), np.full(n, 9), np.full(n, 9))
    with pytest.raises(WorkloadError):
        fit_workload(table)


def test_regular_arrivals_are_fitted_as_nearly_regular():
    table = RequestTable.build(np.arange(100.0), np.full(100, 9), np.full(100, 9))
    fitted = fit_workload(table)
    assert fitted.rate_rps == pytest.approx(1.0)
    assert fitted.arrivals.cv < 0.05
