"""Learned orders: a network that looks at one request at a time, in NumPy or ONNX Runtime."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from servegym.errors import ExportError
from servegym.policy.ordering import (
    GENERATED_TOKENS,
    IS_RUNNING,
    NUM_ORDERING_FEATURES,
    PREDICTED_REMAINING_TOKENS,
    PROMPT_TOKENS,
)
from servegym.policy.policy import Information
from servegym.typing import Float32Array, FloatArray

#: Normalised features are kept within this.
CLIP = 10.0
_NO_POWERS: FloatArray = np.zeros((2, 2))


class OrderingWeights(NamedTuple):
    """A multi-layer perceptron with ReLUs and two heads.

    Its input is `clip((sign(x) log(1 + |x|) - mean) / scale, -10, 10)` of each feature `x`.

    Attributes:
        mean: `float32[NUM_ORDERING_FEATURES]`.
        scale: Same shape, greater than 0.
        weights: Of each layer, `float32[inputs, outputs]`; the last has two outputs, the
            admission score and the victim score.
        biases: Of each layer, `float32[outputs]`.
        powers: Added to the scores, of both heads, `float64[2, 2]`: the weight of the logarithm of
            the predicted tokens left, and that of the logarithm of the KV held meanwhile. With
            weights 1 and `w` and nothing else it is the order `footprint`, which no score that is
            linear in logarithms of features is.
    """

    mean: Float32Array
    scale: Float32Array
    weights: tuple[Float32Array, ...]
    biases: tuple[Float32Array, ...]
    powers: FloatArray = _NO_POWERS

    def require_consistent(self) -> None:
        """Check shapes and values.

        Raises:
            ExportError: If the layers do not fit together or a number is not finite.
        """
        widths = [NUM_ORDERING_FEATURES, *(b.size for b in self.biases)]
        shapes = [w.shape for w in self.weights]
        if shapes != list(pairwise(widths)) or widths[-1] != 2:
            raise ExportError(
                f"the layers of an order must lead from {NUM_ORDERING_FEATURES} features to 2 "
                f"scores, got {shapes}"
            )
        if self.mean.shape != (widths[0],) or self.scale.shape != (widths[0],):
            raise ExportError(f"mean and scale must have {widths[0]} numbers each")
        if self.powers.shape != (2, 2):
            raise ExportError(f"powers must be two of each score, got {self.powers.shape}")
        arrays = (self.mean, self.scale, *self.weights, *self.biases)
        finite = np.isfinite(self.powers).all() and all(np.isfinite(a).all() for a in arrays)
        if not finite or (self.scale <= 0).any():
            raise ExportError("an order's numbers must be finite and its scales greater than 0")


def normalise(features: FloatArray, weights: OrderingWeights) -> Float32Array:
    """Return the network's input, `float32[n, NUM_ORDERING_FEATURES]`."""
    x = features.astype(np.float32)
    x = np.copysign(np.log1p(np.abs(x)), x)
    x -= weights.mean
    x /= weights.scale
    return np.clip(x, -CLIP, CLIP, out=x)


class MlpOrdering:
    """A perceptron as an `OrderingPolicy`, with NumPy alone."""

    memory_size = 0

    def __init__(self, weights: OrderingWeights, *, information: Information, name: str) -> None:
        weights.require_consistent()
        self._weights = weights
        self.information: Information = information
        self.name = name

    def score(self, features: FloatArray, memory: FloatArray) -> FloatArray:
        """Score; see `OrderingPolicy.score`."""
        x = normalise(features, self._weights)
        *hidden, last = zip(self._weights.weights, self._weights.biases, strict=True)
        for weight, bias in hidden:
            x = x @ weight
            x += bias
            np.maximum(x, 0.0, out=x)
        scores = _choose_head(x @ last[0] + last[1], features)
        if self._weights.powers.any():
            left = features[:, PREDICTED_REMAINING_TOKENS]
            held = features[:, PROMPT_TOKENS] + features[:, GENERATED_TOKENS] + 0.5 * left
            powers = self._weights.powers[(features[:, IS_RUNNING] > 0.0).astype(int)]
            scores += powers[:, 0] * np.log(left) + powers[:, 1] * np.log(held)
        return scores


class OnnxOrdering:
    """Any graph `features float32[n, F] -> scores float32[n, 2]`, with ONNX Runtime."""

    memory_size = 0

    def __init__(self, path: Path, *, information: Information, name: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ExportError(
                "an order in ONNX form needs onnxruntime: pip install onnxruntime"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.information: Information = information
        self.name = name
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self._input = self._session.get_inputs()[0].name
            shape = self._run(np.zeros((3, NUM_ORDERING_FEATURES))).shape
        except Exception as error:  # onnxruntime's own have no common base
            raise ExportError(f"{path} cannot be run: {str(error).splitlines()[0]}") from error
        if shape != (3, 2):
            raise ExportError(f"{path} must give two scores a request, gave {shape} for three")

    def _run(self, features: FloatArray) -> Float32Array:
        scores: Float32Array = self._session.run(None, {self._input: features.astype(np.float32)})[
            0
        ]
        return scores

    def score(self, features: FloatArray, memory: FloatArray) -> FloatArray:
        """Score; see `OrderingPolicy.score`."""
        return _choose_head(self._run(features), features)


def _choose_head(scores: Float32Array, features: FloatArray) -> FloatArray:
    chosen = np.where(features[:, IS_RUNNING] > 0.0, scores[:, 1], scores[:, 0])
    return chosen.astype(np.float64)
