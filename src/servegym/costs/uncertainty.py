"""How far step times may be off, and worlds in which they are.

A step is a sum of terms. How far each may be off is known from measurements that its fit did not
see; where there were none, from how far GPUs lie from what others let expect. What no kernel
explains is a factor on the whole step that belongs to the engine: its spread is that of published
measurements about the simulator, see `servegym validate --coverage`. A world draws one factor for
each term of each GPU, and one for the engine; to ask how sure an answer is means to ask in how many
worlds it holds. Nothing here moves a prediction: all factors have the median 1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from servegym.costs.grid import CostGrid
from servegym.costs.shared import SharedCost
from servegym.costs.source import Evidence
from servegym.costs.speculation import Speculation
from servegym.costs.stages import StageGrids
from servegym.costs.step import StepCost
from servegym.engines import EngineName, kernels_of
from servegym.typing import FloatArray

#: A term of a step that is off as a whole.
Term = Literal["cpu", "GEMM", "experts", "norms", "collectives", "prefill", "decode", "mixed"]

#: What of `StepCost.terms` belongs to a term; GEMMs are all others.
_TERMS: Mapping[str, Term] = {
    "experts": "experts",
    "norms, activation": "norms",
    "casts": "norms",
    "all-reduce": "collectives",
    "attention launch": "decode",
}
#: Standard deviations of logarithms where a GPU was not measured. GEMM, prefill, decode: those of
#: reading weights, prefill and decode over six measured GPUs, each against a prior made of the
#: others (`calibrate.adaptation.learn`). Experts: the 95th percentile of bf16 mixtures left out,
#: 40 to 60 %, over 1.96. Norms and mixed steps: as prefill, no better is known. Collectives: of
#: another board of NVLink's; those over PCIe are below.
_PRIOR: Mapping[Term, float] = {
    "GEMM": 0.16,
    "experts": 0.28,
    "norms": 0.33,
    "collectives": 0.33,
    "prefill": 0.33,
    "decode": 0.14,
    "mixed": 0.33,
}
#: Hosts differ by a factor of five in what GPUs reach over PCIe: nine of ten lie within it.
_PCIE = math.log(5.0) / (2 * 1.645)
#: TensorRT-LLM's all-reduces over NVLink are met within 16 to 36 % (95th percentile).
_NVLINK = 0.36 / 1.96
#: Time outside kernels: a prior of 0.5 ms; two GPUs showed up to 1.7 ms.
_CPU = math.log(1.7 / 0.5) / 1.645
#: Own measurements, and tables that were measured at just that shape: their repetition.
_REPEATED = 0.03
#: The normal quantiles of a median and a 95th percentile of absolute values.
_MEDIAN, _P95 = 0.6745, 1.96


class EngineSpread(NamedTuple):
    """What of published measurements kernels do not explain, standard deviations of logarithms.

    Attributes:
        step: Of step times.
        ttft: Of TTFT beside that: the client's side, and how bursts are served.
    """

    step: float
    ttft: float


#: By engine, from all rows of grade A and B (`scripts/engine-spreads`): the 90th percentile of the
#: error over 1.645, rounded. The kernels' part, which `--coverage` takes off, is left in, so that
#: they are rather too wide. vllm-v0: its CUDA builds, whose steps are judged by their throughput.
ENGINE_SPREADS: Mapping[EngineName, EngineSpread] = {
    "vllm": EngineSpread(0.11, 0.51),
    "vllm-v0": EngineSpread(0.29, 0.68),
    "sglang": EngineSpread(0.23, 1.15),
    "trtllm": EngineSpread(0.20, 0.65),
}


@dataclass(frozen=True)
class World:
    """One way in which times may be off; the same for whoever asks about the same thing.

    Attributes:
        seed: Of everything that is drawn.
    """

    seed: int

    def normal(self, *about: str) -> float:
        """Draw a standard normal value about something."""
        key = zlib.crc32("/".join(about).encode())
        return float(np.random.default_rng([self.seed, key]).standard_normal())

    def ttft_factor(self, engine: EngineName) -> float:
        """Draw the factor on TTFT that belongs to an engine and its clients."""
        name = kernels_of(engine)
        return math.exp(ENGINE_SPREADS[name].ttft * self.normal("TTFT", name))

    def step_factor(self, engine: EngineName) -> float:
        """Draw the factor on all steps that belongs to an engine."""
        name = kernels_of(engine)
        return math.exp(ENGINE_SPREADS[name].step * self.normal("step", name))


@dataclass(frozen=True)
class Uncertainty:
    """How far the steps of one kind of replica may be off.

    Attributes:
        gpu: Whose kernels they are: replicas of one GPU are off together.
        whole_steps: Whether whole steps of an engine were measured: then no factor of the engine
            comes on top, and all terms are off together.
        spreads: Standard deviation of the logarithm, by term; without `mixed` it is off as
            `decode` is.
        parts_s: What `CostGrid.dense_s` is made of, by term, `float64[NUM_DENSE_KNOTS]`.
    """

    gpu: str
    whole_steps: bool
    spreads: Mapping[Term, float]
    parts_s: Mapping[Term, FloatArray]

    @classmethod
    def of(cls, gpu: str, cost: StepCost, grid: CostGrid) -> Uncertainty:
        """Take a step apart at the knots of its grid.

        Args:
            gpu: Its name.
            cost: Of the step.
            grid: The same, compiled.
        """
        parts: dict[Term, FloatArray] = {}
        for i, tokens in enumerate(grid.dense_tokens):
            for name, seconds in cost.terms(float(tokens)).items():
                if name == "cpu":
                    continue
                term = _TERMS.get(name, "GEMM")
                parts.setdefault(term, np.zeros(len(grid.dense_tokens)))[i] += seconds
        return cls(gpu, not cost.operators.times_kernels, term_spreads(cost), parts)

    def factors(self, world: World) -> dict[Term, float]:
        """Draw a factor on each term."""
        found = {
            term: math.exp(spread * world.normal("" if self.whole_steps else term, self.gpu))
            for term, spread in self.spreads.items()
        }
        # one kernel for decodes alone and beside a prefill is off in one way
        return {"mixed": found["decode"], **found}

    def engine_factor(self, world: World, engine: EngineName) -> float:
        """Draw the factor on all steps that belongs to an engine."""
        return 1.0 if self.whole_steps else world.step_factor(engine)

    def in_world(self, grid: CostGrid, world: World) -> CostGrid:
        """Return a grid, made of that cost, with the kernels of a world."""
        factor = self.factors(world)
        dense_s = grid.dense_s.copy()
        for term, seconds in self.parts_s.items():
            dense_s += (factor[term] - 1.0) * seconds
        return replace(
            grid,
            cpu_s=factor["cpu"] * grid.cpu_s,
            dense_s=dense_s,
            prefill_s=factor["prefill"] * grid.prefill_s,
            decode_s=factor["decode"] * grid.decode_s,
            mixed_s=factor["mixed"] * grid.mixed_s,
            empty_tiles_s=factor["mixed"] * grid.empty_tiles_s,
            eager_s=factor["cpu"] * grid.eager_s,
        )

    def stages_in_world(self, pipeline: StageGrids, world: World) -> StageGrids:
        """Return a pipeline with the kernels of a world; a stage is off as the whole is.

        Args:
            pipeline: Of that cost, which was taken apart at the knots of the first stage.
            world: Whose kernels it has.
        """
        first = pipeline.stages[0]
        return pipeline.changed(lambda stage: self._part_in_world(first, stage, world))

    def speculation_in_world(self, speculation: Speculation, world: World) -> Speculation:
        """Return drafting and verifying with the kernels of a world.

        Args:
            speculation: Of that cost, which was taken apart at the knots of its steps.
            world: Whose kernels it has.
        """
        steps = speculation.steps
        off = self._part_in_world(steps, steps, world)
        ratio = [off.dense(batch) / steps.dense(batch) for batch in steps.decode_batch]
        return replace(speculation, steps=off, draft_s=np.array(ratio) * speculation.draft_s)

    def _part_in_world(self, first: CostGrid, part: CostGrid, world: World) -> CostGrid:
        """Return a part of a step; it is off as the whole is, taken apart at the first's knots."""
        parts_s = sum(self.parts_s.values(), np.zeros_like(first.dense_s))
        whole = replace(first, cpu_s=1.0, dense_s=parts_s)
        off = self.in_world(whole, world)
        ratio = [off.dense(tokens) / whole.dense(tokens) for tokens in part.dense_tokens]
        found = replace(self, parts_s={}).in_world(part, world)
        return replace(found, dense_s=np.array(ratio) * part.dense_s)

    def shared_in_world(self, shared: SharedCost, world: World) -> SharedCost:
        """Return what ranks do together with the kernels of a world."""
        factor = self.factors(world)
        return replace(
            shared,
            experts_s=factor["experts"] * shared.experts_s,
            skewed_experts_s=factor["experts"] * shared.skewed_experts_s,
            exchange_s=factor["collectives"] * shared.exchange_s,
        )


def term_spreads(cost: StepCost) -> dict[Term, float]:
    """Say how far each term of a step may be off: of several operators, the farthest."""
    found: dict[Term, float] = {"cpu": _CPU, "norms": _PRIOR["norms"]}
    if not cost.operators.times_kernels:
        found = {"cpu": 0.0, "norms": 0.0}
    for term, evidence in _evidence(cost):
        found[term] = max(found.get(term, 0.0), spread(term, evidence, pcie=cost.gpu.pcie))
    if not cost.operators.times_kernels:  # a fit on whole steps knows no terms apart
        widest = max(found.values())
        return {**dict.fromkeys(found, widest), "collectives": widest, "experts": widest}
    found.setdefault("experts", 0.0)
    found.setdefault("collectives", 0.0)
    return found


def _evidence(cost: StepCost) -> list[tuple[Term, Evidence]]:
    attention: tuple[Term, ...] = ("prefill", "decode", "mixed")
    if cost.model.latent_dim:
        attention = ("prefill", "decode", "decode")  # the last is the absorption
    groups = cost.evidence_by_operator
    found: list[tuple[Term, Evidence]] = [("GEMM", one) for one in groups["GEMM"]]
    found += [("experts", one) for one in groups["experts"]]
    found += list(zip(attention, groups["attention"], strict=False))
    found += [("prefill", one) for one in groups["window"]]
    found += [("decode", one) for one in groups["window"]]
    return found + [("collectives", one) for one in groups["collectives"]]


def spread(term: Term, evidence: Evidence, *, pcie: bool) -> float:
    """Say how far an operator may be off: standard deviation of the logarithm of its time.

    Errors have long tails: of the median and the 95th percentile of what was held out, the one that
    says more counts. Beyond measured shapes it is half as much again.
    """
    if evidence.error is not None:
        median, p95 = evidence.error
        known = 0.01 * max(median / _MEDIAN, p95 / _P95)
        return 1.5 * known if evidence.kind == "extrapolated" else known
    if evidence.kind == "measured":
        return _REPEATED
    if term == "collectives":
        return _collective(pcie) if evidence.kind != "prior" or pcie else _PRIOR[term]
    return _PRIOR[term]


def _collective(pcie: bool) -> float:
    return _PCIE if pcie else _NVLINK
