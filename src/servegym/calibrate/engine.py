"""A replica's costs from the log of its own steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import GpuSpec, ModelSpec
from servegym.calibrate.plan import shapes_of
from servegym.calibrate.steps import Steps
from servegym.costs.forms import Operator
from servegym.costs.measurements import Measurements, refuse_impossible
from servegym.costs.source import CostSource, Evidence, Experts, Heads, LatentHeads
from servegym.costs.step import StepCost
from servegym.costs.steplog import fit_step_log
from servegym.errors import ConfigError
from servegym.typing import FloatArray


class EngineFit(BaseModel):
    """Step time as a sum of terms, fitted to an engine's log.

    Attributes:
        overhead_s: Every step: scheduler, launches, reading the weights.
        s_per_prefill_token: Compute of a prompt token.
        s_per_sequence: Compute and sampling of a decoding sequence.
        s_per_kv_token: Reading a cached token.
        s_per_prefill_pair: Attention of a prompt token to one before it.
        error: Median and 95th percentile in percent, on the steps that the fit has not seen.
        num_steps: In the log, half of them fitted on.
        max_prefill_tokens: Largest in the log; beyond, the terms go on.
        max_sequences: Likewise.
        max_kv_tokens: Likewise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["engine"] = "engine"
    overhead_s: float = Field(ge=0)
    s_per_prefill_token: float = Field(ge=0)
    s_per_sequence: float = Field(ge=0)
    s_per_kv_token: float = Field(ge=0)
    s_per_prefill_pair: float = Field(0.0, ge=0)
    error: tuple[float, float]
    num_steps: int = Field(ge=1)
    max_prefill_tokens: int = Field(ge=1)
    max_sequences: int = Field(ge=1)
    max_kv_tokens: int = Field(ge=1)

    def source(self, gpu: GpuSpec, model: ModelSpec, tp: int) -> EngineSource:
        """Make it a source of costs.

        Raises:
            ConfigError: If it is faster than the device can be, or the model has sliding windows.
        """
        head = shapes_of(model, tp).gemms[-1]
        if model.window_layers:
            raise ConfigError(
                "a step log cannot tell the layers with sliding windows of this model from the "
                "others: use servegym calibrate kernels"
            )
        prompts, decodes = self.max_prefill_tokens, self.max_sequences
        tokens = np.array([prompts, decodes], np.float64)
        seconds = np.array(
            [
                self.overhead_s
                + self.s_per_prefill_token * prompts
                + self.s_per_prefill_pair * prompts * (prompts + 1) / 2,
                self.overhead_s
                + self.s_per_sequence * decodes
                + self.s_per_kv_token * self.max_kv_tokens,
            ]
        )
        refuse_faster_than_roofline(gpu, model, tp, tokens, (0, self.max_kv_tokens), seconds)
        unit = EngineSource(self, model.layers, head, s_per_weight=1.0)
        weights = StepCost(gpu, model, tp, source=unit).dense_s(1.0)
        return replace(unit, s_per_weight=unit.s_per_token / weights)


def fit_engine(steps: Steps, gpu: GpuSpec, model: ModelSpec, tp: int) -> EngineFit:
    """Fit by non-negative least squares, and state the error on every second step.

    Raises:
        ConfigError: If the log lacks prefills or decodes, or is faster than the device can be.
    """
    steps.require_both_phases()
    refuse_faster_than_roofline(
        gpu,
        model,
        tp,
        steps.prefill_tokens + steps.decode_sequences,
        steps.kv_tokens,
        steps.duration_s,
    )
    fit = fit_step_log(
        steps.prefill_tokens,
        steps.decode_sequences,
        steps.kv_tokens,
        steps.duration_s,
        steps.prefill_pairs,
    )
    return EngineFit(
        overhead_s=fit.overhead_s,
        s_per_prefill_token=fit.s_per_prefill_token,
        s_per_sequence=fit.s_per_sequence,
        s_per_kv_token=fit.s_per_kv_token,
        s_per_prefill_pair=fit.s_per_prefill_pair,
        error=fit.error,
        num_steps=len(steps.duration_s),
        max_prefill_tokens=int(steps.prefill_tokens.max()),
        max_sequences=int(steps.decode_sequences.max()),
        max_kv_tokens=int(steps.kv_tokens.max()),
    )


def refuse_faster_than_roofline(
    gpu: GpuSpec,
    model: ModelSpec,
    tp: int,
    tokens: FloatArray,
    kv_tokens: npt.ArrayLike,
    duration_s: FloatArray,
) -> None:
    """Refuse steps faster than their layers' arithmetic, or than reading weights and KV once.

    Raises:
        ConfigError: If more than 1 % of the steps are.
    """
    shapes = shapes_of(model, tp)
    layer = sum(n * k for n, k in shapes.gemms[:-1])
    experts = model.active_experts * model.ffn_matrices * model.hidden * model.expert_ffn_dim / tp
    kv = np.asarray(kv_tokens) * 4.0 * shapes.kv_heads * shapes.head_dim
    num_bytes = np.broadcast_to(model.layers * (2.0 * layer + kv), tokens.shape)
    operator = Operator(
        flops=2.0 * model.layers * (layer + experts) * tokens,
        num_bytes=num_bytes,
        cold_bytes=num_bytes,
        coordinates={},
        seq_heads=np.zeros(tokens.shape),
    )
    data = Measurements(operator, duration_s, np.zeros(len(tokens), bool), "engine steps")
    refuse_impossible(data, gpu.bf16_flops, gpu.memory_bytes_per_s, gpu.l2_bytes)


@dataclass(frozen=True)
class EngineSource(CostSource):
    """The terms of an engine fit, dealt out to the operators so that a step sums to the fit.

    What a token costs, prompt or decoded, is spread over the GEMMs by their size; what one of
    the two costs beyond that goes to its attention. All-reduces are in the tokens' time.

    Attributes:
        fit: The terms.
        layers: Of the model; they share the terms.
        head: `(n, k)` of the output head, which is in the time of the sequences.
        s_per_weight: Seconds a token and weight of the layers.
    """

    fit: EngineFit
    layers: int
    head: tuple[int, int]
    s_per_weight: float

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return "engine step log"

    @property
    def s_per_token(self) -> float:
        """What a token costs at least, prompt or decoded."""
        return min(self.fit.s_per_prefill_token, self.fit.s_per_sequence)

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Share of the tokens' time."""
        return 0.0 if (n, k) == self.head else self.s_per_weight * m * n * k

    def experts_s(self, tokens: float, shape: Experts) -> float:
        """Share of the tokens' time."""
        return (
            self.s_per_weight * tokens * shape.active * shape.matrices * shape.hidden * shape.width
        )

    def prefill_attention_s(self, chunk: float, context: float, shape: Heads) -> float:
        """What prompt tokens cost beyond decoded ones, and their pairs; one layer of all."""
        extra_s = (self.fit.s_per_prefill_token - self.s_per_token) * chunk
        pairs = chunk * (context + 0.5 * (chunk + 1.0))
        return (extra_s + self.fit.s_per_prefill_pair * pairs) / self.layers

    def decode_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """What sequences cost beyond prompt tokens, and their KV; one layer of all."""
        extra_s = (self.fit.s_per_sequence - self.s_per_token) * batch
        return (extra_s + self.fit.s_per_kv_token * kv_tokens) / self.layers

    def mixed_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """The same: a log does not tell them apart."""
        return self.decode_attention_s(batch, kv_tokens, shape)

    def latent_prefill_s(self, chunk: float, context: float, shape: LatentHeads) -> float:
        """As any other attention."""
        heads = Heads(shape.heads, shape.heads, shape.head_dim)
        return self.prefill_attention_s(chunk, context, heads)

    def latent_decode_s(
        self, batch: float, kv_tokens: float, shape: LatentHeads, queries: int = 1
    ) -> float:
        """As any other attention."""
        heads = Heads(queries * shape.heads, 1, shape.latent_dim)
        return self.decode_attention_s(batch, kv_tokens, heads)

    def attention_launch_s(self) -> float:
        """Return 0: launches are in the fitted overhead."""
        return 0.0

    def elementwise_s(self, tokens: float, hidden: int, qk_width: int, ffn_width: int) -> float:
        """Return 0: norms and activations are in the fitted time of a token."""
        return 0.0

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Return 0: collectives are in the fitted time of a token."""
        return 0.0

    def all_gather_s(self, num_bytes: float, num_gpus: int) -> float:
        """Part of what a token costs, as the all-reduce."""
        return self.all_reduce_s(num_bytes, num_gpus)

    def cpu_s(self) -> float:
        """Every step's overhead; it has the time to read the weights."""
        return self.fit.overhead_s

    # ---- what stands behind them ----

    def _evidence(self, operator: str) -> Evidence:
        fit = self.fit
        note = f"{fit.num_steps} engine steps, error {fit.error[0]:g} / {fit.error[1]:g} %"
        return Evidence(operator, "interpolated", note, fit.error)

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """Name the log of steps that the fit was made from."""
        return self._evidence(f"GEMM {n} x {k}")

    def experts_evidence(self, shape: Experts) -> Evidence:
        """Name the log of steps that the fit was made from."""
        return self._evidence(str(shape))

    def attention_evidence(self, shape: Heads) -> Sequence[Evidence]:
        """Name the log of steps, with how far it reached in prefill and decode."""
        prompt, kv = self.fit.max_prefill_tokens, self.fit.max_kv_tokens
        return [
            self._evidence(f"prefill attention, to {prompt} tokens a step"),
            self._evidence(f"decode attention, to {self.fit.max_sequences} sequences, {kv} tokens"),
        ]

    def latent_evidence(self, shape: LatentHeads) -> Sequence[Evidence]:
        """Name the log of steps, with how far it reached in prefill and decode."""
        return self.attention_evidence(Heads(shape.heads, 1, shape.latent_dim))

    def all_reduce_evidence(self, num_gpus: int) -> Evidence:
        """Name the log of steps that the fit was made from."""
        return self._evidence(f"all-reduce over {num_gpus}")
