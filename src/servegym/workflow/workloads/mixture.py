"""Several families of jobs in one stream."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.workflow.job import Job
from servegym.workflow.workloads.family import Family
from servegym.workflow.workloads.registry import WorkloadConfig
from servegym.workloads.mixtures import WorkloadPart


class Part(WorkloadPart):
    """One family and how often its jobs come, against the other shares."""

    share: float = Field(gt=0)
    workload: WorkloadConfig

    @property
    def device_types(self) -> tuple[str, ...] | None:
        """Columns of the family's durations, None if it has no tasks."""
        return getattr(self.workload, "device_types", None)


class Mixture(Family):
    """Jobs of several families, each drawn independently of the one before.

    What is known of output lengths is up to the families (`prediction_sigma` of each).

    Attributes:
        parts: The families with their shares.
    """

    labels: ClassVar[tuple[str, ...]] = ()

    kind: Literal["mixture"] = "mixture"
    prediction_sigma: None = None
    parts: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_types(self) -> Self:
        known = sorted({part.device_types for part in self.parts if part.device_types is not None})
        if len(known) > 1:
            named = " and ".join(f"({', '.join(types)})" for types in known)
            raise ValueError(f"all parts must have the same device_types, got {named}")
        return self

    @property
    def device_types(self) -> tuple[str, ...]:
        """Columns of the durations of all parts that have tasks."""
        known = (part.device_types for part in self.parts)
        return next((types for types in known if types is not None), ())

    def job(self, rng: np.random.Generator) -> Job:
        """Draw one job of one of the families."""
        shares = np.array([part.share for part in self.parts])
        part = self.parts[int(rng.choice(len(shares), p=shares / shares.sum()))]
        return part.workload.job(rng)

    def step_name(self, template: str, label: int) -> str:
        """Return what the step of a label is called in jobs of a template."""
        families = (part.workload for part in self.parts if part.workload.kind == template)
        family = next(families, None)
        return family.step_name(template, label) if family else f"step {label}"
