"""Mixtures of lognormal lengths and durations."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from servegym.typing import FloatArray, IntArray


class WorkloadPart(BaseModel):
    """Parameters of a workload: checked, and not to be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LengthConfig(WorkloadPart):
    """A mixture of lognormal lengths: medians in tokens, sigmas of the logarithm."""

    medians_tokens: tuple[Annotated[float, Field(gt=0)], ...] = Field((200.0,), min_length=1)
    sigmas: tuple[Annotated[float, Field(ge=0)], ...] = (0.8,)
    weights: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    min_tokens: int = Field(1, ge=1)
    max_tokens: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        counts = len(self.medians_tokens), len(self.sigmas), len(self.weights)
        if len(set(counts)) > 1:
            raise ValueError(
                "medians_tokens, sigmas and weights need one number a part each, got "
                "{}, {} and {}".format(*counts)
            )
        if not any(self.weights):
            raise ValueError("one of the weights must be above 0")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        return self

    def draw(self, rng: np.random.Generator, num: int) -> IntArray:
        """Draw lengths, `int64[num]`."""
        return self.lengths(self.numbers(rng, num))

    def numbers(self, rng: np.random.Generator, num: int) -> list[FloatArray]:
        """Draw what `lengths` makes lengths of, for who needs some of them: `float64[num]` each."""
        drawn = [rng.standard_normal(num)]
        if len(self.medians_tokens) > 1:
            drawn.append(rng.random(num))
        return drawn

    def lengths(self, numbers: list[FloatArray]) -> IntArray:
        """Make lengths, `int64[n]`, of what `numbers` has drawn, or of some rows of it."""
        if len(self.medians_tokens) == 1:
            raw = self.medians_tokens[0] * np.exp(self.sigmas[0] * numbers[0])
        else:
            bounds, medians, sigmas = _parts(self.weights, self.medians_tokens, self.sigmas)
            part = bounds.searchsorted(numbers[1], side="right")
            raw = medians[part] * np.exp(sigmas[part] * numbers[0])
        return np.clip(np.round(raw), self.min_tokens, self.max_tokens).astype(np.int64)

    @property
    def mean_tokens(self) -> float:
        """Mean before lengths are cut to their limits."""
        return _mixture_mean(self.medians_tokens, self.sigmas, self.weights)


class Seconds(WorkloadPart):
    """A mixture of lognormal durations: medians in seconds, sigmas of the logarithm."""

    medians_s: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)
    sigmas: tuple[Annotated[float, Field(ge=0)], ...]
    weights: tuple[Annotated[float, Field(ge=0)], ...] = (1.0,)
    max_s: float = Field(86400.0, gt=0)

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        counts = len(self.medians_s), len(self.sigmas), len(self.weights)
        if len(set(counts)) > 1 or not any(self.weights):
            raise ValueError(
                "medians_s, sigmas and weights need one number a part each, and one weight above 0,"
                " got {}, {} and {} numbers".format(*counts)
            )
        return self

    @property
    def mean_s(self) -> float:
        """Mean before durations are cut at `max_s`."""
        return _mixture_mean(self.medians_s, self.sigmas, self.weights)

    def draw(self, rng: np.random.Generator) -> float:
        """Draw one duration in seconds."""
        part = rng.choice(len(self.weights), p=np.array(self.weights) / sum(self.weights))
        return float(
            min(self.max_s, self.medians_s[part] * np.exp(self.sigmas[part] * rng.normal()))
        )

    def draw_many(self, rng: np.random.Generator, num: int) -> FloatArray:
        """Draw durations in seconds, `float64[num]`."""
        return self.draw_parts(rng, num)[0]

    def draw_parts(self, rng: np.random.Generator, num: int) -> tuple[FloatArray, IntArray]:
        """Draw durations in seconds, `float64[num]`, and of which part each is, `int64[num]`."""
        part = rng.choice(len(self.weights), num, p=np.array(self.weights) / sum(self.weights))
        z = rng.standard_normal(num)
        raw = np.array(self.medians_s)[part] * np.exp(np.array(self.sigmas)[part] * z)
        return np.minimum(self.max_s, raw), part


@lru_cache(maxsize=256)
def _parts(weights: tuple[float, ...], *columns: tuple[float, ...]) -> tuple[FloatArray, ...]:
    """Return where parts end between 0 and 1, and columns of theirs: many draw one at a time."""
    shares = np.array(weights) / sum(weights)
    return np.cumsum(shares)[:-1], *map(np.array, columns)


def _mixture_mean(
    medians: tuple[float, ...], sigmas: tuple[float, ...], weights: tuple[float, ...]
) -> float:
    share = np.array(weights) / sum(weights)
    return float(share @ (np.array(medians) * np.exp(0.5 * np.array(sigmas) ** 2)))
