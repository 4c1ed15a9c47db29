"""What every family of jobs has: checked parameters, names of its steps, a way to draw a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from pydantic import Field

from servegym.workflow.job import Job
from servegym.workloads.mixtures import LengthConfig, WorkloadPart


class Family(WorkloadPart, ABC):
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


def draw_tokens(rng: np.random.Generator, lengths: LengthConfig) -> int:
    """Draw one length."""
    return int(lengths.draw(rng, 1)[0])


def draw_around(rng: np.random.Generator, mean: float, sigma: float) -> float:
    """Draw a lognormal number of the given mean."""
    return mean * float(np.exp(sigma * rng.normal() - 0.5 * sigma**2))
