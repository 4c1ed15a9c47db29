"""Boosted trees: the compiled growth against a plain one, and what they learn."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines.boosted_trees import (
    _DEPTH,
    _LEAST_ROWS,
    _NUM_BINS,
    _RATE,
    BoostedTrees,
)


def grown(x, y, quantile, num_trees):
    """Fit row by row and node by node; returns what is predicted for the rows themselves."""
    shares = np.arange(1, _NUM_BINS) / _NUM_BINS
    edges = np.quantile(x, shares, axis=0, method="lower").T
    bins = np.stack([np.searchsorted(edges[f], x[:, f]) for f in range(x.shape[1])], axis=1)
    fitted = np.full(len(y), np.quantile(y, quantile))
    for _ in range(num_trees):
        gradient = np.where(y > fitted, quantile, quantile - 1.0)
        nodes = [np.arange(len(y))]
        for _ in range(_DEPTH):
            nodes = [half for rows in nodes for half in split(rows, bins, gradient)]
        for rows in nodes:
            if len(rows):
                residuals = np.sort((y - fitted)[rows])
                place = min(len(rows) - 1, int(quantile * len(rows)))
                fitted[rows] += _RATE * residuals[place]
    return fitted


def split(rows, bins, gradient):
    best, found = 1e-9, None
    for f in range(bins.shape[1]):
        for b in range(_NUM_BINS - 1):
            left = bins[rows, f] <= b
            if min(left.sum(), (~left).sum()) < _LEAST_ROWS:
                continue
            g = gradient[rows]
            gain = g[left].sum() ** 2 / left.sum() + g[~left].sum() ** 2 / (~left).sum()
            gain -= g.sum() ** 2 / len(rows)
            if gain > best + 1e-9:
                best, found = gain, left
    return (rows, rows[:0]) if found is None else (rows[found], rows[~found])


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_compiled_trees_are_those_that_are_grown_plainly(quantile):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(150, 3))
    x[:, 2] = rng.integers(0, 3, 150)
    y = np.sin(2.0 * x[:, 0]) + x[:, 2] + rng.normal(0.0, 0.3, 150)
    model = BoostedTrees.fit(x, y, quantile=quantile, num_trees=5)
    np.testing.assert_allclose(model.predict(x), grown(x, y, quantile, 5), atol=1e-9)


def test_a_quantile_is_learned_where_it_depends_on_features():
    rng = np.random.default_rng(2)
    x = rng.uniform(size=(2000, 2))
    y = np.where(x[:, 0] > 0.5, 10.0, 1.0) * rng.exponential(size=2000)
    found = BoostedTrees.fit(x, y, quantile=0.9).predict(np.array([[0.2, 0.5], [0.8, 0.5]]))
    true = np.array([1.0, 10.0]) * -np.log(0.1)
    assert np.abs(found / true - 1.0).max() < 0.2


@pytest.mark.parametrize("rows", [1, 5])
def test_few_rows_make_no_splits(rows):
    x, y = np.arange(float(rows))[:, None], np.arange(float(rows))
    model = BoostedTrees.fit(x, y, quantile=0.5)
    assert (model.features == -1).all()
    assert np.ptp(model.predict(x)) == 0.0
