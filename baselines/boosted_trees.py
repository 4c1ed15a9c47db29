"""Gradient-boosted regression trees on histograms, for quantiles: small, and learned in windows.

Each tree is grown on the signs of the pinball loss's gradient, level by level, over binned
features; a leaf then adds a share of its residuals' quantile (Friedman 2001, section 4.4, for
quantiles in place of the median).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.cluster.jit import kernel
from servegym.typing import FloatArray, IntArray

#: Bins of a feature, levels of a tree, share of a leaf's value that counts, rows a leaf needs.
_NUM_BINS, _DEPTH, _RATE, _LEAST_ROWS = 32, 3, 0.15, 10
NUM_LEAVES = 1 << _DEPTH


@kernel
def _quantile(values: FloatArray, n: int, share: float) -> float:
    """Return a quantile of the first `n` values, sorting them in place."""
    gap = n // 2  # Shell's sort: NumPy's would have to allocate
    while gap > 0:
        for i in range(gap, n):
            value, j = values[i], i
            while j >= gap and values[j - gap] > value:
                values[j] = values[j - gap]
                j -= gap
            values[j] = value
        gap //= 2
    return values[min(n - 1, int(share * n))]


@kernel
def _grow(
    bins: IntArray,
    y: FloatArray,
    share: float,
    fitted: FloatArray,
    features: IntArray,
    splits: IntArray,
    leaves: FloatArray,
    node: IntArray,
    sums: FloatArray,
    scratch: FloatArray,
) -> None:
    """Grow all trees of a model.

    Args:
        bins: Features as bins, `int64[n, f]`.
        y: What is to be predicted, `float64[n]`.
        share: The quantile.
        fitted: Prediction so far, `float64[n]`.
        features: On which each inner node splits, -1 for none, `int64[trees, NUM_LEAVES - 1]`.
        splits: The last bin that goes left, same shape.
        leaves: `float64[trees, NUM_LEAVES]`.
        node: Scratch, `int64[n]`.
        sums: Scratch, `float64[NUM_LEAVES, f, _NUM_BINS, 2]`.
        scratch: Scratch, `float64[n]`.
    """
    n, num_features = bins.shape
    for tree in range(features.shape[0]):
        node[:] = 0
        first = 0
        for level in range(_DEPTH):
            width = 1 << level
            sums[:] = 0.0
            for i in range(n):
                gradient = share if y[i] > fitted[i] else share - 1.0
                for f in range(num_features):
                    sums[node[i], f, bins[i, f], 0] += gradient
                    sums[node[i], f, bins[i, f], 1] += 1.0
            for k in range(width):
                best, feature, split = 1e-9, -1, 0
                for f in range(num_features):
                    total, rows = 0.0, 0.0
                    for b in range(_NUM_BINS):
                        total += sums[k, f, b, 0]
                        rows += sums[k, f, b, 1]
                    left, left_rows = 0.0, 0.0
                    for b in range(_NUM_BINS - 1):
                        left += sums[k, f, b, 0]
                        left_rows += sums[k, f, b, 1]
                        right, right_rows = total - left, rows - left_rows
                        if left_rows < _LEAST_ROWS or right_rows < _LEAST_ROWS:
                            continue
                        gain = left**2 / left_rows + right**2 / right_rows - total**2 / rows
                        if gain > best:
                            best, feature, split = gain, f, b
                features[tree, first + k] = feature
                splits[tree, first + k] = split
            for i in range(n):
                at = first + node[i]
                f = features[tree, at]
                right_side = f >= 0 and bins[i, f] > splits[tree, at]
                node[i] = 2 * node[i] + (1 if right_side else 0)
            first += width
        for leaf in range(NUM_LEAVES):
            rows_in = 0
            for i in range(n):
                if node[i] == leaf:
                    scratch[rows_in] = y[i] - fitted[i]
                    rows_in += 1
            value = 0.0
            if rows_in > 0:
                value = _RATE * _quantile(scratch, rows_in, share)
            leaves[tree, leaf] = value
        for i in range(n):
            fitted[i] += leaves[tree, node[i]]


@kernel
def _predict(
    x: FloatArray,
    edges: FloatArray,
    features: IntArray,
    splits: IntArray,
    leaves: FloatArray,
    start: float,
    out: FloatArray,
) -> None:
    """Predict for rows of raw features, `x: float64[m, f]`."""
    for i in range(x.shape[0]):
        found = start
        for tree in range(features.shape[0]):
            at, first = 0, 0
            for level in range(_DEPTH):
                f = features[tree, first + at]
                right = f >= 0 and x[i, f] > edges[f, splits[tree, first + at]]
                at = 2 * at + (1 if right else 0)
                first += 1 << level
            found += leaves[tree, at]
        out[i] = found


@dataclass(frozen=True)
class BoostedTrees:
    """A model of a quantile.

    Attributes:
        edges: Upper edges of the bins, `float64[f, _NUM_BINS - 1]`.
        features: See `_grow`; so are the next two.
        splits: See there.
        leaves: See there.
        start: Prediction of no tree.
    """

    edges: FloatArray
    features: IntArray
    splits: IntArray
    leaves: FloatArray
    start: float

    @classmethod
    def fit(
        cls, x: FloatArray, y: FloatArray, *, quantile: float, num_trees: int = 30
    ) -> BoostedTrees:
        """Learn a model.

        Args:
            x: Features, `float64[n, f]`.
            y: What is to be predicted, `float64[n]`, at least one.
            quantile: Which quantile of it, between 0 and 1.
            num_trees: How many trees.
        """
        n, num_features = x.shape
        shares = np.arange(1, _NUM_BINS) / _NUM_BINS
        edges = np.ascontiguousarray(np.quantile(x, shares, axis=0, method="lower").T)
        bins = np.empty((n, num_features), np.int64)
        for f in range(num_features):
            bins[:, f] = np.searchsorted(edges[f], x[:, f], side="left")
        start = float(np.quantile(y, quantile))
        features = np.full((num_trees, NUM_LEAVES - 1), -1)
        splits, leaves = np.zeros_like(features), np.zeros((num_trees, NUM_LEAVES))
        _grow(
            bins,
            np.ascontiguousarray(y, np.float64),
            quantile,
            np.full(n, start),
            features,
            splits,
            leaves,
            np.zeros(n, np.int64),
            np.zeros((NUM_LEAVES, num_features, _NUM_BINS, 2)),
            np.zeros(n),
        )
        return cls(edges, features, splits, leaves, start)

    def predict(self, x: FloatArray) -> FloatArray:
        """Predict for rows of features, `float64[m, f]`; returns `float64[m]`."""
        out = np.empty(len(x))
        _predict(x, self.edges, self.features, self.splits, self.leaves, self.start, out)
        return out


def rehearse() -> None:
    """Compile what models are made of and asked by: no decision is to wait for it."""
    x = np.zeros((1, 1))
    BoostedTrees.fit(x, np.zeros(1), quantile=0.5, num_trees=1).predict(x)
