"""The fitted source: rooflines and corrections fitted on measured kernel tables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from servegym.assets.specs import GpuSpec, KernelFit
from servegym.costs import forms, mla
from servegym.costs.curve import Surface
from servegym.costs.forms import ELEMENT_BYTES, WEIGHT_BYTES, LogTable, Operator, table_of
from servegym.costs.source import Evidence, Experts, Heads, LatentHeads, Precision, Routing, Scales
from servegym.engines import EngineName
from servegym.errors import ConfigError
from servegym.typing import FloatArray

#: Time of an iteration that no kernel accounts for: what measured iterations of vLLM 0.19 on two
#: GPUs lasted beyond the sum of their kernels (-0.3 to 1.7 ms). A prior on all others.
CPU_S = 0.5e-3
#: Norms, rotary embedding and activation where they were not measured.
ELEMENTWISE = KernelFit(c0_s=9.5e-6, eff_bytes=1.0, prior=True)
#: Kernels that these are: two norms, rotary embedding, activation.
ELEMENTWISE_KERNELS = 4
#: A cast to fp8 where it was not measured; the median of what was.
CAST = KernelFit(c0_s=1.5e-6, eff_bytes=0.8, prior=True)
#: Sizes at which operators are sampled before they are interpolated.
_TOKENS = np.unique(np.round(np.geomspace(1, 65536, 97)))
_CHUNKS = np.unique(np.round(np.geomspace(1, 32768, 61)))
_CONTEXTS = np.concatenate(([1e-3], np.geomspace(16, 262144, 36)))
_BATCHES = np.geomspace(1, 2048, 23)
_KV_TOKENS = np.geomspace(1, 2.0**24, 97)


@dataclass(frozen=True)
class RooflineSource:
    """Operator times of a GPU from the fits in `assets`.

    A measured operator is never faster than the memory: benchmarks repeat an operator on data
    that stays in the cache, an engine streams its weights and KV through it between two uses.

    Attributes:
        gpu: Peaks and coefficients.
        fp8: Whether GEMMs run in fp8.
        cpu_overhead_s: Time of an iteration outside the device.
        fp4: Whether weights have four bits.
        bf16_dense: Whether all but experts stay in 16 bits.
        scales: Of activations in fp8; `static` GEMMs, in fp4 too, take activations that are
            quantised already (`cast_s`), all others quantise theirs.
        fp8_kv: Whether the KV cache of ordinary heads has eight bits.
    """

    gpu: GpuSpec
    fp8: bool = False
    cpu_overhead_s: float = CPU_S
    fp4: bool = False
    bf16_dense: bool = False
    scales: Scales = "dynamic"
    fp8_kv: bool = False
    _surfaces: dict[tuple[object, ...], Surface] = field(
        default_factory=dict, compare=False, repr=False
    )
    _tables: dict[str, LogTable | None] = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return "fits" + (" (prior)" if self.gpu.gemm.prior else "")

    @property
    def times_kernels(self) -> bool:
        """Whether times are of single kernels: they are."""
        return True

    def for_step(
        self, *, engine: EngineName, scales: Scales, fp8_kv: bool, bf16_dense: bool
    ) -> RooflineSource:
        """Return the source with the kernels of a step; see `CostSource.for_step`."""
        gpu, bf16_dense = self.gpu.of(engine), bf16_dense or self.bf16_dense
        wanted = (gpu, scales, fp8_kv, bf16_dense)
        if wanted == (self.gpu, self.scales, self.fp8_kv, self.bf16_dense):
            return self
        return replace(
            self,
            gpu=gpu,
            scales=scales,
            fp8_kv=fp8_kv,
            bf16_dense=bf16_dense,
            _surfaces={},
            _tables={},
        )

    def in_16bit(self) -> RooflineSource:
        """Return the source of the parts that stay in 16 bits."""
        return replace(self, bf16_dense=True, _surfaces={}, _tables={})

    @property
    def precision(self) -> Precision:
        """Precision of weights; of experts' where all else stays in 16 bits."""
        return "fp4" if self.fp4 else "fp8" if self.fp8 else "bf16"

    @property
    def gemm_precision(self) -> Precision:
        """Precision of weights outside experts."""
        return "bf16" if self.bf16_dense else self.precision

    def _peak_flops(self, precision: Precision) -> float:
        peaks = {"fp4": self.gpu.fp4_flops or self.gpu.bf16_flops, "fp8": self.gpu.fp8_flops}
        return peaks.get(precision, self.gpu.bf16_flops)

    # ---- what a subclass replaces: the fit of an operator, and its correction ----

    def _gemm_fit(self, n: float, k: float) -> tuple[KernelFit, LogTable | None]:
        return self._with_table("gemm", self._measured_gemm() or self.gpu.gemm)

    def _measured_gemm(self) -> KernelFit | None:
        """The fit of this precision, if it has one of its own."""
        static = self.scales == "static"
        if self.gemm_precision == "fp4":
            return self.gpu.fp4_static_gemm if static else self.gpu.fp4_gemm
        if self.gemm_precision == "fp8":
            gpu = self.gpu
            measured = {"static": gpu.fp8_static_gemm, "block": gpu.fp8_block_gemm}
            return measured.get(self.scales, gpu.fp8_gemm)
        return self.gpu.gemm

    def _prefill(self) -> KernelFit:
        return (self.gpu.prefill_fp8 if self.fp8_kv else None) or self.gpu.prefill

    def _decode(self) -> KernelFit:
        return (self.gpu.decode_fp8 if self.fp8_kv else None) or self.gpu.decode

    @property
    def _kv_bytes(self) -> float:
        return 1.0 if self.fp8_kv else ELEMENT_BYTES

    def _prefill_fit(self, shape: Heads) -> tuple[KernelFit, LogTable | None]:
        return self._with_table("prefill", self._prefill())

    def _decode_fit(self, shape: Heads) -> tuple[KernelFit, LogTable | None]:
        return self._with_table("decode", self._decode())

    def _experts_fit(self, shape: Experts) -> tuple[KernelFit, LogTable | None] | None:
        measured = self._measured_routing(shape.routing)
        if measured is None:
            return None
        return self._with_table(f"experts {measured}", self.gpu.moe[f"{self.precision} {measured}"])

    def _measured_routing(self, routing: Routing) -> Routing | None:
        """This one, or the other if only that was measured."""
        other: Routing = "skewed" if routing == "uniform" else "uniform"
        kinds: tuple[Routing, ...] = (routing, other)
        return next((kind for kind in kinds if f"{self.precision} {kind}" in self.gpu.moe), None)

    def _with_table(self, operator: str, fit: KernelFit) -> tuple[KernelFit, LogTable | None]:
        if operator not in self._tables:
            self._tables[operator] = table_of(fit)
        return fit, self._tables[operator]

    # ---- seconds ----

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]`."""
        fit, table = self._gemm_fit(n, k)
        peak_flops = self._peak_flops(self.gemm_precision)
        if table is None:
            operator = forms.gemm(m, n, k, weight_bytes)
            return float(operator.form_s(fit, peak_flops, self.gpu.memory_bytes_per_s))
        key = ("gemm", n, k, weight_bytes)
        if key not in self._surfaces:
            operator = forms.gemm(_TOKENS, n, k, weight_bytes)
            seconds = self._cold(operator, fit, table, peak_flops)
            self._surfaces[key] = _curve(_TOKENS, seconds)
        return self._surfaces[key](m, 1.0)

    def experts_s(self, tokens: float, shape: Experts) -> float:
        """Seconds of the experts of a layer; without a fit GEMMs of the experts touched."""
        found = self._experts_fit(shape)
        if found is None:
            return self._experts_as_gemms(tokens, shape)
        fit, table = found
        key = ("experts", *shape)
        if key not in self._surfaces:
            operator = forms.experts(_TOKENS, *shape[:6])
            self._surfaces[key] = _curve(_TOKENS, self._cold(operator, fit, table))
        return self._surfaces[key](tokens, 1.0)

    def _experts_as_gemms(self, tokens: float, shape: Experts) -> float:
        hidden, width, num_experts, active, matrices, weight_bytes, _ = shape
        # uniform routing: expected number of distinct experts that `tokens` tokens touch
        touched = num_experts * (1.0 - (1.0 - active / num_experts) ** tokens)
        rows = tokens * active / touched
        one = self.gemm_s(rows, (matrices - 1) * width, hidden, weight_bytes)
        one += self.gemm_s(rows, hidden, width, weight_bytes)
        # experts run in one grouped kernel: its launch is paid once, not once per expert
        launch = 2.0 * self._gemm_fit(width, hidden)[0].c0_s
        weights = weight_bytes * matrices * width * hidden
        return touched * max(one - launch, weights / self.gpu.memory_bytes_per_s) + launch

    def prefill_attention_s(self, chunk: float, context: float, shape: Heads) -> float:
        """Seconds of causal attention of a chunk over what is cached, without the launch."""
        fit, table = self._prefill_fit(shape)
        if table is None:
            operator = forms.prefill(chunk, context, *shape, kv_bytes=self._kv_bytes)
            return self._form_s(operator, fit)
        key = ("prefill", *shape)
        if key not in self._surfaces:
            attention = (self.gpu.bf16_flops, self.attention_launch_s())
            operator = forms.prefill(
                _CHUNKS[:, None], _CONTEXTS[None, :], *shape, kv_bytes=self._kv_bytes
            )
            seconds = self._cold(operator, fit, table, *attention)
            if table.axes["heads"][0] >= 1:
                chain = self._chain_s(
                    _CHUNKS[:, None] + _CONTEXTS[None, :], shape.head_dim, fit, table
                )
                seconds = np.maximum(seconds, chain)
            self._surfaces[key] = Surface.through(_CHUNKS, _CONTEXTS, seconds)
        whole_s = self._surfaces[key](chunk, max(context, _CONTEXTS[0]))
        return max(whole_s - self.attention_launch_s(), 0.0)

    def _form_s(self, operator: Operator, fit: KernelFit) -> float:
        """Seconds by the form alone, without the launch."""
        seconds = operator.form_s(fit, self.gpu.bf16_flops, self.gpu.memory_bytes_per_s)
        return float(seconds) - fit.c0_s

    def _chain_s(
        self, kv_tokens: FloatArray, head_dim: int, fit: KernelFit, table: LogTable
    ) -> FloatArray:
        """Seconds of one tile of queries walking along all its keys.

        A few new tokens over a long context have too few tiles to fill the GPU. What one tile
        takes shows in prompts of one head; beyond the longest of these it grows in proportion.
        """
        longest = table.axes["length"][-1]
        operator = forms.prefill(np.minimum(kv_tokens, longest), 0.0, 1, 1, head_dim)
        one_s = operator.measured_s(fit, table, self.gpu.bf16_flops, self.gpu.memory_bytes_per_s)
        return one_s * np.maximum(kv_tokens / longest, 1.0)

    def decode_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of one token each of `batch` sequences over `kv_tokens` in all, no launch."""
        fit, table = self._decode_fit(shape)
        if table is None:
            return self._form_s(
                forms.decode(batch, kv_tokens, *shape, kv_bytes=self._kv_bytes), fit
            )
        key = ("decode", *shape)
        if key not in self._surfaces:
            attention = (self.gpu.bf16_flops, self.attention_launch_s())
            operator = forms.decode(
                _BATCHES[:, None], _KV_TOKENS[None, :], *shape, kv_bytes=self._kv_bytes
            )
            seconds = self._cold(operator, fit, table, *attention)
            streamed = self.gpu.decode_streamed
            # fitted on groups; a measurement of one's own takes the place of both
            if streamed and shape.heads > shape.kv_heads and fit is self.gpu.decode:
                peaks = (self.gpu.bf16_flops, self.gpu.memory_bytes_per_s)
                profiled = operator.measured_s(streamed, table_of(streamed), *peaks)
                seconds = np.maximum(seconds, profiled)
            self._surfaces[key] = Surface.through(
                _BATCHES, _KV_TOKENS, seconds, growing_x=self.decode_grows_with_batch
            )
        return max(self._surfaces[key](batch, kv_tokens) - self.attention_launch_s(), 0.0)

    @property
    def decode_grows_with_batch(self) -> bool:
        """Whether the same tokens in more sequences never take less time.

        They may: one sequence leaves multiprocessors idle that several fill. Times with vLLM's
        kernels over a 16-bit cache are kept from falling all the same.
        """
        return self.gpu.engine == "vllm" and not self.fp8_kv

    def mixed_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of such decodes in a step that also prefills, no launch.

        Kernels that read an 8-bit cache pack the heads of a group beside prefills as well.
        """
        alone_s = self.decode_attention_s(batch, kv_tokens, shape)
        fit = self.gpu.mixed
        if fit is None or self.fp8_kv:
            return alone_s
        operator = forms.unpacked_decode(
            batch, kv_tokens, *shape, self.gpu.l2_bytes, self.gpu.num_sms
        )
        return float(operator.form_s(fit, self.gpu.bf16_flops, self.gpu.memory_bytes_per_s))

    def mixed_bends(self, heads: int, kv_heads: int) -> tuple[float, ...]:
        """Batches at which `mixed_attention_s` bends, for grids to have a knot there.

        That is where the tiles of all heads fill the multiprocessors, those of a group, or one.
        """
        if self.gpu.mixed is None or self.fp8_kv:
            return ()
        sms = self.gpu.num_sms
        return sms / heads, sms * kv_heads / heads, float(sms)

    def empty_tiles_s(self, heads: int) -> float:
        """Seconds that each decode adds to a call for each token of the longest chunk beside it."""
        fit = None if self.fp8_kv else self.gpu.mixed
        return fit.s_per_empty_tile * float(forms.empty_tiles(1, 1, heads)) if fit else 0.0

    def latent_prefill_s(self, chunk: float, context: float, shape: LatentHeads) -> float:
        """Seconds of new tokens with latent attention, launch and expansion included.

        Keys and values of cached tokens are expanded again for every chunk.
        """
        key = ("latent prefill", shape)
        if key not in self._surfaces:
            self._surfaces[key] = mla.prefill_surface(self.gpu, shape)
        weight_bytes = WEIGHT_BYTES[self.gemm_precision]
        expansion_s = self.gemm_s(chunk + context, *shape.expansion, weight_bytes)
        return expansion_s + self._surfaces[key](chunk, max(context, _CONTEXTS[0]))

    def latent_decode_s(
        self, batch: float, kv_tokens: float, shape: LatentHeads, queries: int = 1
    ) -> float:
        """Seconds of decoding with latent attention, absorption included, no launch.

        Several query tokens of a sequence are to its latents what more heads are.
        """
        rows = replace(shape, heads=queries * shape.heads)
        key, absorption = ("latent decode", rows), ("absorption", shape)
        if key not in self._surfaces:
            self._surfaces[key] = mla.decode_surface(self.gpu, rows)
        if absorption not in self._surfaces:
            self._surfaces[absorption] = mla.absorption_surface(self.gpu, shape)
        attention_s = self._surfaces[key](batch, kv_tokens) - self.attention_launch_s()
        return max(attention_s, 0.0) + self._surfaces[absorption](queries * batch, 1.0)

    def attention_launch_s(self) -> float:
        """Constant part of one attention kernel."""
        return self._decode().c0_s

    def elementwise_s(self, tokens: float, hidden: int, qk_width: int, ffn_width: int) -> float:
        """Seconds of a layer's norms, rotary embedding and activation."""
        fit, table = self._with_table("elementwise", self.gpu.elementwise or ELEMENTWISE)
        key = ("elementwise", hidden, qk_width, ffn_width)
        if key not in self._surfaces:
            operator = forms.elementwise(_TOKENS, hidden, qk_width, ffn_width)
            peaks = (self.gpu.bf16_flops, self.gpu.memory_bytes_per_s)
            self._surfaces[key] = _curve(_TOKENS, operator.measured_s(fit, table, *peaks))
        return self._surfaces[key](tokens, 1.0)

    def one_elementwise_s(self) -> float:
        """Seconds of one such kernel on a few tokens."""
        return (self.gpu.elementwise or ELEMENTWISE).c0_s / ELEMENTWISE_KERNELS

    def qk_norm_s(self, tokens: float, qk_width: int) -> float:
        """Seconds to read and write queries and keys once, beside the launch."""
        moved = 2.0 * ELEMENT_BYTES * tokens * qk_width
        eff_bytes = (self.gpu.elementwise or ELEMENTWISE).eff_bytes
        return moved / (self.gpu.memory_bytes_per_s * eff_bytes)

    def cast_s(self, tokens: float, width: int) -> float:
        """Seconds of a kernel that casts activations of that width to fp8 by a given scale."""
        fit, table = self._with_table("cast", self.gpu.quantise or CAST)
        key = ("cast", width)
        if key not in self._surfaces:
            operator = forms.quantise(_TOKENS, width)
            peaks = (self.gpu.bf16_flops, self.gpu.memory_bytes_per_s)
            self._surfaces[key] = _curve(_TOKENS, operator.measured_s(fit, table, *peaks))
        return self._surfaces[key](tokens, 1.0)

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce.

        Raises:
            ConfigError: If there is no fit for that many GPUs.
        """
        if num_gpus == 1:
            return 0.0
        if num_gpus not in self.gpu.all_reduce:
            raise ConfigError(
                f"no all-reduce fit over {num_gpus} GPUs of this type: "
                f"choose tp from {[1, *sorted(self.gpu.all_reduce)]}"
            )
        share = 2.0 * (num_gpus - 1) / num_gpus
        return forms.collective_s(self.gpu.all_reduce[num_gpus], share * num_bytes)

    def all_gather_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-gather or a reduce-scatter of `num_bytes` in all."""
        if num_gpus not in self.gpu.all_gather:
            return 0.5 * self.all_reduce_s(num_bytes, num_gpus)
        share = (num_gpus - 1) / num_gpus
        return forms.collective_s(self.gpu.all_gather[num_gpus], share * num_bytes)

    def cpu_s(self) -> float:
        """Time of an engine iteration outside the device."""
        return self.cpu_overhead_s

    def _cold(
        self,
        operator: Operator,
        fit: KernelFit,
        table: LogTable | None,
        peak_flops: float | None = None,
        launch_s: float = 0.0,
    ) -> FloatArray:
        peaks = (peak_flops or self._peak_flops(self.precision), self.gpu.memory_bytes_per_s)
        warm = operator.measured_s(fit, table, *peaks)
        return np.maximum(warm, launch_s + operator.floor_s(fit, *peaks))

    # ---- what stands behind them ----

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """Between the fitted shapes or beyond them."""
        operator = f"GEMM {n} x {k} {self.gemm_precision}"
        fit, _ = self._gemm_fit(n, k)
        if self._measured_gemm() is None:
            kind: str = self.gemm_precision
            if kind == "fp8" and self.scales != "dynamic":
                kind = f"fp8 with {self.scales} scales"
            note = f"not measured in {kind} on this GPU: the form of bf16 with its peak"
            return Evidence(operator, "prior", note)
        coordinates = forms.gemm(1, n, k, 2.0).coordinates
        return _fit_evidence(operator, fit, {x: coordinates[x] for x in coordinates if x != "m"})

    def experts_evidence(self, shape: Experts) -> Evidence:
        """Between the fitted mixtures or beyond them."""
        operator = f"{shape} {self.precision}, {shape.routing} routing"
        found = self._experts_fit(shape)
        if found is None:
            note = "not measured: GEMMs of the experts that uniform routing touches"
            return Evidence(operator, "prior", note)
        measured = self._measured_routing(shape.routing)
        if measured != shape.routing:
            return Evidence(operator, "prior", f"only {measured} routing was measured")
        at = forms.experts(1, *shape[:6]).coordinates
        return _fit_evidence(operator, found[0], {name: at[name] for name in ("matrix", "experts")})

    def attention_evidence(self, shape: Heads) -> list[Evidence]:
        """Between the fitted shapes or beyond them: prefill, then decode."""
        found = []
        for operator, fit in (("prefill", self._prefill()), ("decode", self._decode())):
            evidence = _fit_evidence(f"{operator} attention, {shape}", fit, {})
            measured = getattr(self.gpu, f"{operator}_fp8")
            if self.fp8_kv and measured is None:
                note = "not measured with an 8-bit KV cache: 16-bit kernels with half the bytes"
                evidence = Evidence(evidence.operator, "prior", note)
            if evidence.kind == "interpolated" and self._borrowed:
                evidence = Evidence(evidence.operator, "prior", self._borrowed)
            if shape.head_dim != 128 and evidence.kind == "interpolated":
                note = "fitted on heads of 128 elements"
                evidence = Evidence(evidence.operator, "extrapolated", note, evidence.error)
            found.append(evidence)
        return found + self._mixed_evidence(shape)

    @property
    def _borrowed(self) -> str:
        """Why vLLM's attention stands in for the engine's, if it does."""
        engine = self.gpu.engine
        fits = self.gpu.engines.get(engine)
        own = engine in ("vllm", "vllm-v0") or (fits is not None and fits.decode is not None)
        return "" if own else f"vLLM's kernels stand in for those of {engine}"

    def _mixed_evidence(self, shape: Heads) -> list[Evidence]:
        fit = self.gpu.mixed
        if fit is None or self.fp8_kv:
            return []
        operator = f"decodes beside a prefill, {shape}"
        note = "tiles of FlashAttention 2; FLOP share of long prefills, not measured in mixed steps"
        return [
            Evidence(operator, "prior", note)
            if fit.prior
            else Evidence(operator, "interpolated", fit.source, fit.error)
        ]

    def latent_evidence(self, shape: LatentHeads) -> list[Evidence]:
        """Prefill, decode and absorption."""
        return mla.latent_evidence(self.gpu, shape)

    def all_reduce_evidence(self, num_gpus: int) -> Evidence:
        """A fit by size, or a prior: over PCIe hosts differ by a factor of four to six."""
        operator = f"all-reduce over {num_gpus}"
        if self.gpu.pcie:
            note = "over PCIe, fitted on another host: servegym calibrate kernels measures yours"
            return Evidence(operator, "prior", note)
        prior = num_gpus in self.gpu.all_reduce and self.gpu.all_reduce[num_gpus].prior
        kind: Literal["prior", "interpolated"] = "prior" if prior else "interpolated"
        return Evidence(operator, kind, "fit over message sizes")


def _curve(x: FloatArray, seconds: FloatArray) -> Surface:
    return Surface.through(x, np.array([1.0, 2.0]), np.stack([seconds, seconds], axis=1))


def _fit_evidence(operator: str, fit: KernelFit, shape: dict[str, FloatArray]) -> Evidence:
    if fit.prior:
        return Evidence(operator, "prior", "not measured on this GPU: median of measured ones")
    if fit.correction:
        for name, value in shape.items():
            knots = fit.correction.axes.get(name)
            if knots and not knots[0] * 0.999 <= float(value) <= knots[-1] * 1.001:
                reach = f"{knots[0]:g} to {knots[-1]:g}"
                note = f"{name} {float(value):g} is outside the measured {reach}"
                return Evidence(operator, "extrapolated", note, fit.error)
    return Evidence(operator, "interpolated", fit.source, fit.error)
