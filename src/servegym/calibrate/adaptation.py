"""A new device from its data sheet and a few of its steps.

Hardware-adaptive in the manner of HELP (Lee et al., NeurIPS 2021): what the known devices have in
common is learned once, and a handful of measurements places a new device among them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import GpuSpec, ModelSpec, gpu
from servegym.calibrate.datasheet import measured_gpus, prior_spec
from servegym.calibrate.plan import shapes_of
from servegym.calibrate.steps import Steps
from servegym.costs import forms
from servegym.costs.forms import Operator
from servegym.costs.measurements import error
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import CostSource, Evidence, Experts, Heads
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.typing import FloatArray, IntArray

MAX_SAMPLES = 10
#: What a measured step scatters by, and how far a factor may be off where all devices agree.
_NOISE = 0.05
_LEAST_SPREAD = 0.05


class Factors(BaseModel):
    """Time over what the data sheet's prior says, by part of a step.

    Attributes:
        arithmetic: GEMMs and experts as far as they compute.
        weights: GEMMs and experts as far as they read weights.
        prefill: Attention of new tokens.
        decode: Attention of one token a sequence.
        overhead: Launches, norms, collectives and the time outside the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    arithmetic: float = Field(1.0, gt=0)
    weights: float = Field(1.0, gt=0)
    prefill: float = Field(1.0, gt=0)
    decode: float = Field(1.0, gt=0)
    overhead: float = Field(1.0, ge=0)


_NAMES = tuple(Factors.model_fields)


class Adaptation(BaseModel):
    """A data sheet's prior, corrected by a few steps.

    Attributes:
        factors: Of the prior's times.
        num_samples: Steps it was adapted to.
        error: Median and 95th percentile in percent on the other steps of the log, if there
            were any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["adapted"] = "adapted"
    factors: Factors
    num_samples: int = Field(ge=1, le=MAX_SAMPLES)
    error: tuple[float, float] | None = None

    def source(self, gpu: GpuSpec, model: ModelSpec, tp: int) -> AdaptedSource:
        """Make it a source of costs.

        Raises:
            ConfigError: If a factor is faster than the data sheet.
        """
        shapes_of(model, tp)
        base = prior_spec(gpu)
        for name, least in zip(_NAMES, _least(base), strict=True):
            factor = getattr(self.factors, name)
            if factor < least * 0.999:
                raise ConfigError(
                    f"the factor of {name}, {factor:g}, is faster than the data sheet allows: "
                    f"it must be at least {least:g}"
                )
        error = f", error {self.error[0]:g} / {self.error[1]:g} %" if self.error else ""
        note = f"data-sheet prior adapted to {self.num_samples} steps{error}"
        return AdaptedSource(base, factors=self.factors, note=note)


@dataclass(frozen=True)
class AdaptedSource(RooflineSource):
    """The times of a prior, each part multiplied by its factor; a step is linear in the factors.

    Attributes:
        factors: By part.
        note: What stands behind them.
    """

    factors: Factors = field(default_factory=Factors)
    note: str = ""

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return "adapted prior"

    def _dense_factor(self, operator: Operator) -> float:
        """Split an operator between arithmetic and weights, as the bend between its roofs does."""
        fit = self.gpu.gemm
        compute = (operator.flops / (self._peak_flops(self.precision) * fit.eff_flops)) ** fit.p
        memory = (operator.num_bytes / (self.gpu.memory_bytes_per_s * fit.eff_bytes)) ** fit.p
        share = float(compute / (compute + memory))
        return share * self.factors.arithmetic + (1.0 - share) * self.factors.weights

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]`."""
        launch_s = self.gpu.gemm.c0_s
        work_s = RooflineSource.gemm_s(self, m, n, k, weight_bytes) - launch_s
        factor = self._dense_factor(forms.gemm(m, n, k, weight_bytes))
        return work_s * factor + launch_s * self.factors.overhead

    def experts_s(self, tokens: float, shape: Experts) -> float:
        """Seconds of the experts of a layer, as GEMMs of the experts touched."""
        base_s = RooflineSource(self.gpu).experts_s(tokens, shape)
        return base_s * self._dense_factor(forms.experts(tokens, *shape[:6]))

    def prefill_attention_s(self, chunk: float, context: float, shape: Heads) -> float:
        """Seconds of causal attention of a chunk over what is cached, without the launch."""
        base_s = RooflineSource.prefill_attention_s(self, chunk, context, shape)
        return self.factors.prefill * base_s

    def decode_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of one token each of `batch` sequences over `kv_tokens` in all, no launch."""
        base_s = RooflineSource.decode_attention_s(self, batch, kv_tokens, shape)
        return self.factors.decode * base_s

    def mixed_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of such decodes in a step that also prefills: tiles as of a prefill."""
        factor = self.factors.prefill if self.gpu.mixed else 1.0  # without, decode has its own
        return factor * RooflineSource.mixed_attention_s(self, batch, kv_tokens, shape)

    def attention_launch_s(self) -> float:
        """Constant part of one attention kernel."""
        return self.factors.overhead * RooflineSource.attention_launch_s(self)

    def elementwise_s(self, tokens: float, hidden: int, qk_width: int, ffn_width: int) -> float:
        """Seconds of a layer's norms, rotary embedding and activation."""
        one_s = RooflineSource.elementwise_s(self, tokens, hidden, qk_width, ffn_width)
        return self.factors.overhead * one_s

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce."""
        return self.factors.overhead * RooflineSource.all_reduce_s(self, num_bytes, num_gpus)

    def cpu_s(self) -> float:
        """Time of an engine iteration outside the device."""
        return self.factors.overhead * self.cpu_overhead_s

    # ---- what stands behind them ----

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """The prior and its steps."""
        return Evidence(f"GEMM {n} x {k} bf16", "prior", self.note)

    def experts_evidence(self, shape: Experts) -> Evidence:
        """The prior and its steps."""
        return Evidence(f"{shape} bf16", "prior", self.note)

    def attention_evidence(self, shape: Heads) -> list[Evidence]:
        """The prior and its steps."""
        names = ("prefill attention", "decode attention")
        return [Evidence(name, "prior", self.note) for name in names]

    def all_reduce_evidence(self, num_gpus: int) -> Evidence:
        """The prior and its steps."""
        return Evidence(f"all-reduce over {num_gpus}", "prior", self.note)


class Experience(NamedTuple):
    """What the factors of known devices look like.

    Attributes:
        mean: Of the logarithms of the factors, `float64[5]`.
        covariance: Of the same, over the devices, `float64[5, 5]`.
    """

    mean: FloatArray
    covariance: FloatArray


#: What is assumed of a device without looking at any other.
_IGNORANCE = Experience(np.zeros(len(_NAMES)), 0.25 * np.eye(len(_NAMES)))


def learn(model: ModelSpec, tp: int, devices: list[str]) -> Experience:
    """Learn how far devices lie from what the others let expect of their data sheets."""
    steps = typical_steps(60, seed=0)
    found = []
    for name in devices:
        others = [other for other in devices if other != name]
        base = prior_spec(gpu(name), others)
        seconds = step_seconds(RooflineSource(gpu(name)), gpu(name), model, tp, steps)
        factors = fit_factors(base, model, tp, steps, seconds, _IGNORANCE)
        found.append([getattr(factors, field) for field in _NAMES])
    logs = np.log(found)
    covariance = np.cov(logs.T)
    # a few devices say little about how factors go together: half of it is believed
    alone = np.diag(np.maximum(np.diag(covariance), _LEAST_SPREAD**2))
    return Experience(logs.mean(axis=0), 0.5 * (covariance + alone))


def adapt(base: GpuSpec, model: ModelSpec, tp: int, steps: Steps) -> Adaptation:
    """Adapt a data sheet's prior to at most ten steps of a log, and test it on the others.

    Args:
        base: Made by `prior_spec`.
        model: The architecture.
        tp: Tensor-parallel degree.
        steps: Of the device's engine; those that differ most from each other are taken.
    """
    taken = choose_steps(steps, MAX_SAMPLES)
    experience = learn(model, tp, measured_gpus())
    factors = fit_factors(base, model, tp, steps[taken], steps.duration_s[taken], experience)
    rest = np.setdiff1d(np.arange(len(steps)), taken)
    off = None
    if len(rest):
        source = AdaptedSource(base, factors=factors)
        predicted = step_seconds(source, base, model, tp, steps[rest])
        off = error(predicted, steps.duration_s[rest])
    return Adaptation(factors=factors, num_samples=len(taken), error=off)


def fit_factors(
    base: GpuSpec,
    model: ModelSpec,
    tp: int,
    steps: Steps,
    seconds: FloatArray,
    experience: Experience,
) -> Factors:
    """Find the most probable factors, given the steps and what other devices were like.

    Times scatter log-normally; so do the factors. None may be faster than the data sheet.
    """
    z = experience.mean.copy()
    precision = np.linalg.inv(experience.covariance)
    least = np.log(_least(base))
    if len(steps):
        parts = _parts(base, model, tp, steps)
        for _ in range(30):  # Gauss-Newton on the logarithms
            share = parts * np.exp(z)
            total = share.sum(axis=1)
            slope = share / total[:, None] / _NOISE
            off = np.log(seconds / total) / _NOISE
            matrix = slope.T @ slope + precision
            pull = slope.T @ off + precision @ (experience.mean - z)
            z = np.maximum(z + np.clip(np.linalg.solve(matrix, pull), -0.5, 0.5), least)
    z = np.maximum(z, least)
    values = {name: float(f"{x:.4g}") for name, x in zip(_NAMES, np.exp(z), strict=True)}
    return Factors(**values)


def _parts(base: GpuSpec, model: ModelSpec, tp: int, steps: Steps) -> FloatArray:
    """Seconds of each part of each step, `float64[N, 5]`."""
    whole = step_seconds(AdaptedSource(base), base, model, tp, steps)
    doubled = (AdaptedSource(base, factors=Factors(**{name: 2.0})) for name in _NAMES)
    parts = [step_seconds(source, base, model, tp, steps) - whole for source in doubled]
    return np.stack(parts, axis=1)


def step_seconds(
    source: CostSource, spec: GpuSpec, model: ModelSpec, tp: int, steps: Steps
) -> FloatArray:
    """Seconds of steps; the prompt tokens of a step are taken for those of one request."""
    cost = StepCost(spec, model, tp, source=source)
    context = steps.prefill_context
    rows = zip(steps.prefill_tokens, context, steps.decode_sequences, steps.kv_tokens, strict=True)
    return np.array([sum(cost.terms(c + b, c, h, b, kv).values()) for c, h, b, kv in rows])


def typical_steps(count: int, seed: int) -> Steps:
    """Draw steps of all sizes: of decodes, of one prompt, and mixed; durations are 1 s."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, count)
    prompt = np.where(kind != 0, np.exp(rng.uniform(np.log(16), np.log(8192), count)), 0).round()
    cached = rng.choice([0.0, 0.0, 0.0, 1024.0, 4096.0], count)
    batch = np.where(kind != 1, np.exp(rng.uniform(0, np.log(256), count)), 0).round()
    kv_tokens = (batch * np.exp(rng.uniform(np.log(64), np.log(8192), count))).round()
    pairs = prompt * (cached + (prompt + 1) / 2)
    return Steps(prompt, batch, kv_tokens, np.ones(count), pairs)


def choose_steps(steps: Steps, count: int) -> IntArray:
    """Choose steps that differ most in their sizes: each the furthest from those before it."""
    sizes = np.stack([steps.prefill_tokens, steps.decode_sequences, steps.kv_tokens], axis=1)
    places = np.log1p(sizes)
    places = places / np.maximum(places.max(axis=0), 1.0)
    chosen = [int(np.argmax(steps.duration_s))]
    while len(chosen) < min(count, len(steps)):
        away = np.linalg.norm(places[:, None] - places[None, chosen], axis=2).min(axis=1)
        away[chosen] = -1.0
        chosen.append(int(np.argmax(away)))
    return np.array(sorted(chosen), np.int64)


def _least(base: GpuSpec) -> FloatArray:
    """Factors at which each part runs at the data sheet's peak."""
    gemm = base.gemm
    peaks = [gemm.eff_flops, gemm.eff_bytes, base.prefill.eff_flops, base.decode.eff_bytes]
    return np.array([*peaks, 1e-3], np.float64)
