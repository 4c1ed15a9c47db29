"""Costs corrected by factors that a running fleet's latencies speak for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import GpuSpec, ModelSpec
from servegym.calibrate.adaptation import Adaptation
from servegym.calibrate.engine import EngineFit
from servegym.calibrate.kernels import KernelTimes
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import CostSource, Evidence, Experts, Heads, LatentHeads
from servegym.costs.tables import TableSource


class Correction(BaseModel):
    """Factors on the terms of other costs, from `servegym replay`.

    Attributes:
        step: On what a step of one token costs without attention: launches, reading weights.
        kv: On the attention of decoding sequences.
        prefill: On what further tokens cost, and on the attention of a prompt.
        fp8: Whether the costs corrected are those of fp8 weights.
        costs: Which costs of the device are corrected where there is no base.
        num_requests: It was fitted to.
        base: Costs that are corrected; left out: those that servegym has of the device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["corrected"] = "corrected"
    step: float = Field(gt=0)
    kv: float = Field(gt=0)
    prefill: float = Field(gt=0)
    fp8: bool = False
    costs: Literal["fits", "tables"] = "fits"
    num_requests: int = Field(ge=1)
    base: Annotated[KernelTimes | EngineFit | Adaptation, Field(discriminator="kind")] | None = None

    def source(self, gpu: GpuSpec, model: ModelSpec, tp: int) -> CorrectedSource:
        """Make it a source of costs.

        Raises:
            ConfigError: If the costs that it corrects are unfinished or impossible.
        """
        base: CostSource
        if self.base is not None:
            base = self.base.source(gpu, model, tp)
        elif self.costs == "tables":
            base = TableSource(gpu, self.fp8)
        else:
            base = RooflineSource(gpu, self.fp8)
        return CorrectedSource(self, base, model.hidden)


@dataclass(frozen=True)
class CorrectedSource(CostSource):
    """Each operator at one token times `step`, what it takes beyond that times `prefill`.

    Attributes:
        factors: By term.
        base: Costs that are corrected.
        hidden: Of the model, for the bytes of one token.
    """

    factors: Correction
    base: CostSource
    hidden: int

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return f"{self.base.name}, corrected by a log"

    def _dense(self, one_s: float, all_s: float) -> float:
        return self.factors.step * one_s + self.factors.prefill * (all_s - one_s)

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]`."""
        one_s = self.base.gemm_s(1.0, n, k, weight_bytes)
        return self._dense(one_s, self.base.gemm_s(m, n, k, weight_bytes))

    def experts_s(self, tokens: float, shape: Experts) -> float:
        """Seconds of the experts of a layer."""
        return self._dense(self.base.experts_s(1.0, shape), self.base.experts_s(tokens, shape))

    def elementwise_s(self, tokens: float, hidden: int, qk_width: int, ffn_width: int) -> float:
        """Seconds of a layer's norms, rotary embedding and activation."""
        shape = (hidden, qk_width, ffn_width)
        one_s = self.base.elementwise_s(1.0, *shape)
        return self._dense(one_s, self.base.elementwise_s(tokens, *shape))

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce."""
        one_s = self.base.all_reduce_s(2.0 * self.hidden, num_gpus)
        return self._dense(one_s, self.base.all_reduce_s(num_bytes, num_gpus))

    def all_gather_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-gather or a reduce-scatter."""
        one_s = self.base.all_gather_s(2.0 * self.hidden, num_gpus)
        return self._dense(one_s, self.base.all_gather_s(num_bytes, num_gpus))

    def attention_launch_s(self) -> float:
        """Constant part of one attention kernel."""
        return self.factors.step * self.base.attention_launch_s()

    def cpu_s(self) -> float:
        """Time of an engine iteration outside the device."""
        return self.factors.step * self.base.cpu_s()

    def prefill_attention_s(self, chunk: float, context: float, shape: Heads) -> float:
        """Seconds of causal attention of a chunk over what is cached."""
        return self.factors.prefill * self.base.prefill_attention_s(chunk, context, shape)

    def decode_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of one token each of `batch` sequences."""
        return self.factors.kv * self.base.decode_attention_s(batch, kv_tokens, shape)

    def mixed_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of such decodes in a step that also prefills."""
        return self.factors.kv * self.base.mixed_attention_s(batch, kv_tokens, shape)

    def mixed_bends(self, heads: int, kv_heads: int) -> tuple[float, ...]:
        """Batches at which `mixed_attention_s` bends."""
        return self.base.mixed_bends(heads, kv_heads)

    def latent_prefill_s(self, chunk: float, context: float, shape: LatentHeads) -> float:
        """Seconds of new tokens with latent attention."""
        return self.factors.prefill * self.base.latent_prefill_s(chunk, context, shape)

    def latent_decode_s(
        self, batch: float, kv_tokens: float, shape: LatentHeads, queries: int = 1
    ) -> float:
        """Seconds of decoding with latent attention."""
        return self.factors.kv * self.base.latent_decode_s(batch, kv_tokens, shape, queries)

    # ---- what stands behind them ----

    def _corrected(self, evidence: Evidence) -> Evidence:
        found = self.factors
        note = (
            f"{evidence.note}; times {found.step:g} a step, {found.kv:g} KV, {found.prefill:g} "
            f"prefill from {found.num_requests} logged requests"
        )
        return replace(evidence, note=note.removeprefix("; "))

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """That of the base, and the log."""
        return self._corrected(self.base.gemm_evidence(n, k))

    def experts_evidence(self, shape: Experts) -> Evidence:
        """That of the base, and the log."""
        return self._corrected(self.base.experts_evidence(shape))

    def attention_evidence(self, shape: Heads) -> Sequence[Evidence]:
        """That of the base, and the log."""
        return [self._corrected(one) for one in self.base.attention_evidence(shape)]

    def latent_evidence(self, shape: LatentHeads) -> Sequence[Evidence]:
        """That of the base, and the log."""
        return [self._corrected(one) for one in self.base.latent_evidence(shape)]

    def all_reduce_evidence(self, num_gpus: int) -> Evidence:
        """That of the base, and the log."""
        return self._corrected(self.base.all_reduce_evidence(num_gpus))
