"""Length predictors with a stated error."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.typing import FloatArray, Int32Array


class PredictorConfig(BaseModel):
    """How well output lengths are foreseen.

    `lognormal` multiplies the truth by `exp(sigma * normal)`; `bucket` names one of
    `num_buckets` equally likely length classes, right with probability `accuracy` and else a
    neighbour, and answers that class's median; `mean` knows the average alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["lognormal", "bucket", "mean", "perfect"] = "lognormal"
    sigma: float = Field(0.5, ge=0)
    accuracy: float = Field(0.7, ge=0, le=1)
    num_buckets: int = Field(10, ge=2)

    def predict(self, rng: np.random.Generator, output_tokens: Int32Array) -> FloatArray:
        """Predict output lengths.

        Args:
            rng: Randomness of the errors.
            output_tokens: True lengths, `int32[n]`.

        Returns:
            Predicted lengths in tokens, at least 1, `float64[n]`.
        """
        truth = output_tokens.astype(np.float64)
        if self.kind == "perfect":
            return truth
        if self.kind == "mean":
            return np.full(len(truth), max(1.0, truth.mean()))
        if self.kind == "lognormal":
            return np.maximum(1.0, truth * np.exp(self.sigma * rng.standard_normal(len(truth))))
        edges = np.quantile(truth, np.linspace(0, 1, self.num_buckets + 1)[1:-1])
        bucket = np.searchsorted(edges, truth, side="right")
        wrong = rng.random(len(truth)) >= self.accuracy
        last = self.num_buckets - 1
        shift = np.where(rng.random(len(truth)) < 0.5, -1, 1)
        shift = np.where(bucket == 0, 1, np.where(bucket == last, -1, shift))
        guess = bucket + wrong * shift
        medians = np.quantile(truth, (np.arange(self.num_buckets) + 0.5) / self.num_buckets)
        return np.maximum(1.0, medians[guess])
