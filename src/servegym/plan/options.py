"""The kinds of replicas that fleets can be made of, and the fleets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from servegym.assets.specs import gpu, model
from servegym.baselines.registry import RULES
from servegym.cluster.spec import ReplicaType
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.plan.prices import Price
from servegym.plan.question import Question
from servegym.scenario.fleet import (
    GPUS_PER_NODE,
    FleetEntry,
    SpeculativeConfig,
    replica_type,
    step_cost,
)

#: Replicas of each option, in their order.
Fleet = tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """A kind of replica.

    Attributes:
        entry: Its GPU, degree, stages and drafts.
        cost: What its steps cost.
        replica: The same, compiled.
        usd_per_h: Rent of one.
    """

    entry: FleetEntry
    cost: StepCost
    replica: ReplicaType
    usd_per_h: float

    @property
    def name(self) -> str:
        """GPU, degree, stages and drafts."""
        return self.replica.name

    @property
    def status(self) -> str:
        """`extrapolated` with stages or drafts, whose parts nobody measured; else the step's."""
        return "extrapolated" if self.replica.parts else self.cost.status


class LeftOut(NamedTuple):
    """A kind of replica that no fleet can have, and why."""

    name: str
    why: str


def find_options(
    question: Question, prices: Mapping[str, Price]
) -> tuple[list[Option], list[LeftOut]]:
    """Compile every GPU at every degree and number of stages and drafts, the cheapest first.

    Args:
        question: GPUs, degrees, stages, drafts and the model.
        prices: By GPU.

    Returns:
        Those that can serve the model, and those that cannot.

    Raises:
        ConfigError: If a GPU, the model or a rule is unknown, or nothing can serve the model.
    """
    model(question.model)
    for name in question.rules:
        RULES.make(name)
    options: list[Option] = []
    left_out: list[LeftOut] = []
    for name in question.gpus:
        gpu(name)
        kinds = itertools.product(question.stages, question.drafts, question.degrees)
        for pp, drafts, degree in kinds:
            label = f"{name} x{degree}" + (f" pp{pp}" if pp > 1 else "")
            label += f" {drafts} drafts" if drafts else ""
            why = ""
            if pp > 1 and pp * degree > GPUS_PER_NODE:
                why = f"{pp * degree} GPUs are more than the {GPUS_PER_NODE} of a node"
            elif pp > 1 and drafts:
                why = "stages of a pipeline and drafts do not go together yet"
            if why:
                left_out.append(LeftOut(label, why))
                continue
            entry = FleetEntry(gpu=name, tp=degree, pipeline_parallel_size=pp)
            if drafts:
                config = SpeculativeConfig.model_validate(
                    {"num_speculative_tokens": drafts, "acceptance_rates": question.acceptance}
                )
                entry = entry.model_copy(update={"speculative_config": config})
            try:
                cost = step_cost(entry, question.model, question.precision)
                replica = replica_type(entry, question.model, question.precision, question.engine)
            except ConfigError as error:
                left_out.append(LeftOut(label, str(error)))
                continue
            options.append(Option(entry, cost, replica, prices[name].usd_per_h * entry.num_gpus))
    if not options:
        raise ConfigError(
            f"no replica of these GPUs and degrees can serve {question.model} in "
            f"{question.precision}: {left_out[0].name}: {left_out[0].why}"
        )
    return sorted(options, key=lambda option: option.usd_per_h), left_out


def usd_per_h(fleet: Fleet, options: Sequence[Option]) -> float:
    """Rent of a fleet, dollars an hour."""
    # rounded, so that fleets of equal rent compare equal whatever they add up
    return round(sum(n * o.usd_per_h for n, o in zip(fleet, options, strict=True)), 9)


def fleet_text(fleet: Fleet, options: Sequence[Option]) -> str:
    """Name a fleet, such as `2 H100-SXM-80GB x2 + 1 L40S x1`."""
    parts = [f"{n} {o.name}" for n, o in zip(fleet, options, strict=True) if n]
    return " + ".join(parts)
