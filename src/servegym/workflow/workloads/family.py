"""What every family of jobs has: checked parameters, names of its steps, a way to draw a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from servegym.workflow.job import Job
from servegym.workloads.config import LengthConfig


class Config(BaseModel):
    """Parameters that are checked and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Seconds(Config):
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


class Family(Config, ABC):
    """A kind of job.

    What is known of output lengths beforehand is the mean of their step, which a scheduler could
    learn from the past; with `prediction_sigma` it is the true length times
    `exp(prediction_sigma * normal)`, as a predictor that sees the request would say.
    """

    #: Names of the steps, by the labels of `Job`.
    labels: ClassVar[tuple[str, ...]]

    prediction_sigma: float | None = Field(None, ge=0)

    @abstractmethod
    def job(self, rng: np.random.Generator) -> Job:
        """Draw one job."""

    def step_name(self, template: str, label: int) -> str:
        """Return what the step of a label is called in jobs of a template."""
        return self.labels[label] if label < len(self.labels) else f"step {label}"

    def expected_tokens(self, rng: np.random.Generator, true: int, mean: float) -> float:
        """Return what is known beforehand of an output of `true` tokens, at least 1."""
        if self.prediction_sigma is None:
            return max(1.0, mean)
        return max(1.0, true * float(np.exp(self.prediction_sigma * rng.normal())))


def mean_tokens(lengths: LengthConfig) -> float:
    """Return the mean of lengths before they are cut to their limits."""
    return _mixture_mean(lengths.medians_tokens, lengths.sigmas, lengths.weights)


def draw_tokens(rng: np.random.Generator, lengths: LengthConfig) -> int:
    """Draw one length."""
    return int(lengths.draw(rng, 1)[0])


def draw_around(rng: np.random.Generator, mean: float, sigma: float) -> float:
    """Draw a lognormal number of the given mean."""
    return mean * float(np.exp(sigma * rng.normal() - 0.5 * sigma**2))


def _mixture_mean(
    medians: tuple[float, ...], sigmas: tuple[float, ...], weights: tuple[float, ...]
) -> float:
    share = np.array(weights) / sum(weights)
    return float(share @ (np.array(medians) * np.exp(0.5 * np.array(sigmas) ** 2)))
