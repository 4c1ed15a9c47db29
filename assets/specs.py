"""GPU and model specifications, read from the YAML files beside this one."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from servegym.errors import ConfigError, unknown_name


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Correction(_Spec):
    """How far measured times lie from the analytic form, over a few coordinates of the shape.

    Attributes:
        axes: Ascending knots of each coordinate (`servegym.costs.forms` names them).
        percent: 100 log(measured / form) at every combination of knots, last axis fastest.
    """

    axes: dict[str, tuple[float, ...]]
    percent: tuple[int, ...]

    @model_validator(mode="after")
    def _check_size(self) -> Correction:
        size = math.prod(len(knots) for knots in self.axes.values())
        if size != len(self.percent):
            raise ValueError(f"a correction over {size} knots has {len(self.percent)} values")
        if any(b <= a for k in self.axes.values() for a, b in pairwise(k)):
            raise ValueError("the knots of a correction must ascend strictly")
        return self


class KernelFit(_Spec):
    """Coefficients of one operator; the forms are in `gpus.yaml`.

    Attributes:
        c0_s: Launch.
        eff_bytes: Share of the data-sheet bandwidth.
        eff_flops: Share of the data-sheet FLOP rate.
        p: Sharpness of the bend between the two roofs.
        s_per_seq_head: Decode attention only: seconds a sequence and KV head (`mixed`: and head).
        s_per_empty_tile: `mixed` only: seconds a tile of queries that has none, see
            `costs.forms.empty_tiles`.
        cache_bytes: Weights or KV up to about this size stay in the cache of a benchmark that
            repeats the operator; 0: no sign of that.
        cache_speedup: How much faster they are then read.
        correction: What the form misses; without it the form stands alone.
        error: Median and 95th percentile of the error on held-out measurements, percent.
        form_error: The same for the form without its correction.
        num_held_out: Held-out measurements.
        source: What was measured.
        prior: Not measured on this GPU.
    """

    c0_s: float
    eff_bytes: float
    eff_flops: float = 1.0
    p: float = 1.0
    s_per_seq_head: float = 0.0
    s_per_empty_tile: float = 0.0
    cache_bytes: float = 0.0
    cache_speedup: float = 1.0
    correction: Correction | None = None
    error: tuple[float, float] | None = None
    form_error: tuple[float, float] | None = None
    num_held_out: int = 0
    source: str = ""
    prior: bool = False

    @model_validator(mode="after")
    def _check_physics(self) -> KernelFit:
        if self.eff_flops > 1 or self.eff_bytes > 1:
            raise ValueError(
                "a kernel cannot be faster than the data sheet: eff_flops "
                f"{self.eff_flops:g} and eff_bytes {self.eff_bytes:g} must be at most 1"
            )
        return self


class AllReduceFit(_Spec):
    """Coefficients of an all-reduce, or all-gather, over a given number of GPUs."""

    alpha_s: float
    bus_bytes_per_s: float
    p: float
    prior: bool = False


class EngineFits(_Spec):
    """Operators of one engine's own kernels, where they differ from those of vLLM.

    Attributes:
        fp8_block_gemm: GEMM in fp8 with a scale a block.
        prefill: Attention of new tokens.
        decode: Attention of one token a sequence.
        prefill_fp8: The first over an 8-bit KV cache.
        decode_fp8: The second over one.
        moe: Grouped experts by precision and routing.
        all_reduce: By number of GPUs.
    """

    fp8_block_gemm: KernelFit | None = None
    prefill: KernelFit | None = None
    decode: KernelFit | None = None
    prefill_fp8: KernelFit | None = None
    decode_fp8: KernelFit | None = None
    moe: dict[str, KernelFit] = {}
    all_reduce: dict[int, AllReduceFit] = {}


class GpuSpec(_Spec):
    """A GPU: peaks, memory, rent and kernel efficiencies.

    Attributes:
        bf16_flops: Dense FLOP/s.
        fp8_flops: The same in fp8; 0 without such units.
        fp4_flops: The same in fp4.
        memory_bytes: All of it.
        memory_bytes_per_s: Bandwidth.
        l2_bytes: Last cache; measurements that fit in it do not show the memory.
        num_sms: Streaming multiprocessors or compute units; needed beside `mixed`.
        price_usd_per_h: Rent.
        source: Of the peaks.
        price_source: Of the rent.
        aic_system: Name in AIConfigurator's tables, empty if not in them.
        gemm: GEMM in bf16.
        fp8_gemm: GEMM in fp8 with the quantisation of its activations, if measured.
        fp8_static_gemm: The same alone: activations come in fp8, by scales that a checkpoint holds.
        fp8_block_gemm: GEMM in fp8 with a scale a block of weights and 128 activations, these
            quantised in it.
        fp4_gemm: GEMM in fp4 with the quantisation of its activations, if measured.
        fp4_static_gemm: The same alone.
        quantise: A kernel that casts activations to fp8 by a given scale.
        prefill: Attention of new tokens.
        prefill_fp8: The same over an 8-bit KV cache, if measured.
        decode: Attention of one token a sequence.
        decode_fp8: The same over an 8-bit KV cache, if measured.
        decode_streamed: The same by a profile of an engine, in which KV does not stay in the
            cache; grouped heads only. The slower of the two counts.
        mixed: The same in a step that also prefills, where the engine's kernel then treats a
            decode like a chunk (FlashAttention 2: compute capability 8 and 12). Without it decodes
            cost the same in both: kernels that pack the heads of a group (FlashAttention 3) or a
            kernel of their own.
        moe: Grouped experts by precision and routing, e.g. `"bf16 balanced"`.
        mla: Latent attention: `absorption`, and `prefill` and `decode` by precision of the KV
            cache, e.g. `"decode bf16"` (`servegym.costs.mla`).
        elementwise: Norms, rotary embedding and activation of a layer.
        pcie: Whether several of these GPUs reach each other over PCIe: then collectives depend on
            the host.
        all_reduce: By number of GPUs.
        all_gather: The same for an all-gather or a reduce-scatter by NCCL, whose volume is half as
            large; not measured: half an all-reduce.
        engines: Kernels of engines other than vLLM, by engine.
        engine: Whose kernels the fits above are of, see `of`.
    """

    bf16_flops: float
    fp8_flops: float = 0.0
    fp4_flops: float = 0.0
    memory_bytes: float
    memory_bytes_per_s: float
    l2_bytes: float = 0.0
    num_sms: int = 0
    price_usd_per_h: float
    source: str
    price_source: str
    aic_system: str = ""
    gemm: KernelFit
    fp8_gemm: KernelFit | None = None
    fp8_static_gemm: KernelFit | None = None
    fp8_block_gemm: KernelFit | None = None
    fp4_gemm: KernelFit | None = None
    fp4_static_gemm: KernelFit | None = None
    quantise: KernelFit | None = None
    prefill: KernelFit
    prefill_fp8: KernelFit | None = None
    decode: KernelFit
    decode_fp8: KernelFit | None = None
    decode_streamed: KernelFit | None = None
    mixed: KernelFit | None = None
    moe: dict[str, KernelFit] = {}
    mla: dict[str, KernelFit] = {}
    elementwise: KernelFit | None = None
    pcie: bool = False
    all_reduce: dict[int, AllReduceFit]
    all_gather: dict[int, AllReduceFit] = {}
    engines: dict[str, EngineFits] = {}
    engine: str = "vllm"

    def of(self, engine: str) -> GpuSpec:
        """The GPU with the kernels of an engine where they have fits of their own."""
        if engine == self.engine:
            return self
        own = self.engines.get(engine, EngineFits())
        found = {name: getattr(own, name) for name in EngineFits.model_fields}
        found["all_reduce"] = self.all_reduce | own.all_reduce
        found["moe"] = self.moe | own.moe
        fits = {name: fit for name, fit in found.items() if fit is not None}
        return self.model_copy(update={**fits, "engine": engine})


class ModelSpec(_Spec):
    """A decoder-only transformer; sizes in elements.

    Attributes:
        window_tokens: Tokens a sliding-window layer attends to; 0: no such layers.
        window_layers: Layers with that window.
        parallel_ffn: Whether attention and FFN of a layer have the same input and engines add
            their outputs before tensor-parallel GPUs reduce: once a layer.
        qk_norm: Whether queries and keys have a norm a head before their rotary embedding.
        fused_norms: Engines whose implementation of this model computes its norms, and the cast of
            their result to fp8 or fp4, in the kernel of the all-reduce before them.
        fp4_experts_only: Whether its fp4 checkpoint keeps all but the experts in 16 bits.
        latent_dim: Multi-head latent attention (MLA): elements of the compressed K and V of a
            token, shared by all heads; 0: ordinary heads.
        latent_rope_dim: Elements of the rotary key beside it.
        latent_query_dim: Elements of the compressed query; 0: the query is not compressed.
        dense_layers: Layers of a mixture that have one FFN of `ffn_dim` in place of experts.
        shared_ffn_dim: Width of the experts that every token passes beside the routed ones.
        fp4_16bit: Parts beside experts that its fp4 checkpoint keeps in 16 bits: the projections
            to queries, keys and values, the attention's output projection, the output head.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    num_experts: int
    active_experts: int
    expert_ffn_dim: int
    vocab: int
    ffn_matrices: int
    kv_bytes_per_token: int
    num_params: float
    source: str
    window_tokens: int = 0
    window_layers: int = 0
    parallel_ffn: bool = False
    qk_norm: bool = False
    fused_norms: tuple[str, ...] = ()
    fp4_experts_only: bool = False
    latent_dim: int = 0
    latent_rope_dim: int = 0
    latent_query_dim: int = 0
    dense_layers: int = 0
    shared_ffn_dim: int = 0
    fp4_16bit: tuple[Literal["projections", "output", "head"], ...] = ()

    @model_validator(mode="after")
    def _check_parts(self) -> ModelSpec:
        if not self.num_experts and (self.dense_layers or self.shared_ffn_dim):
            raise ValueError("dense_layers and shared_ffn_dim are for mixtures of experts")
        if self.num_experts and not 0 <= self.dense_layers < self.layers:
            raise ValueError(
                f"dense_layers must be from 0 to {self.layers - 1}, got {self.dense_layers}"
            )
        if self.active_experts > self.num_experts:
            raise ValueError(f"{self.active_experts} active experts of {self.num_experts}")
        if self.latent_dim and (self.kv_heads != 1 or not self.latent_rope_dim):
            raise ValueError("latent attention has kv_heads 1 and a latent_rope_dim")
        return self

    @property
    def expert_layers(self) -> int:
        """Number of layers with experts."""
        return self.layers - self.dense_layers if self.num_experts else 0

    @property
    def expert_params(self) -> int:
        """Weights of all routed experts."""
        one = self.ffn_matrices * self.hidden * self.expert_ffn_dim
        return self.expert_layers * self.num_experts * one


_S = TypeVar("_S", bound=_Spec)


@cache
def _read(file: str) -> dict[str, dict[str, object]]:
    text = resources.files("servegym.assets").joinpath(file).read_text(encoding="utf-8")
    return dict(json.loads(text) if file.endswith(".json") else yaml.safe_load(text))


def _find(kind: str, file: str, cls: type[_S], name: str) -> _S:
    entries = _read(file)
    if name not in entries:
        raise ConfigError(unknown_name(kind, name, entries))
    return cls.model_validate(entries[name])


def gpu_names() -> list[str]:
    """Names of all GPUs."""
    return sorted(_read("gpus.yaml"))


def model_names() -> list[str]:
    """Names of all models."""
    return sorted(_read("models.yaml"))


@cache
def gpu(name: str) -> GpuSpec:
    """Return a GPU's specification: `gpus.yaml`, with what was measured of its chip.

    Operators are in `kernels.json`, those of latent attention in `mla.json`.

    Raises:
        ConfigError: If there is none of that name, or its calibration is impossible.
    """
    entries = _read("gpus.yaml")
    if name not in entries:
        raise ConfigError(unknown_name("GPU", name, entries))
    entry, fits = dict(entries[name]), _read("kernels.json")
    latent = _read("mla.json")
    chip = str(entry.pop("like", ""))
    fitted = {**_as_priors(fits.get(chip, {})), **fits.get(name, {})}
    fitted["mla"] = {**_as_priors(latent.get(chip, {})), **latent.get(name, {})}
    return calibrated(name, {**fitted, **entry})


def _as_priors(fits: dict[str, object]) -> dict[str, object]:
    """Fits of another GPU with the same chip: shares of its peaks, errors unknown."""
    unknown = {"prior": True, "error": None, "form_error": None, "num_held_out": 0, "source": ""}
    found: dict[str, object] = {}
    for operator, fit in fits.items():
        if operator in ("all_gather", "all_reduce") or not isinstance(fit, dict):
            continue  # links differ between boards of one chip
        nested = "c0_s" not in fit
        found[operator] = _as_priors(fit) if nested else {**fit, **unknown}
    return found


def calibrated(name: str, entry: dict[str, object]) -> GpuSpec:
    """Check a GPU's peaks and coefficients.

    Args:
        name: Of the GPU, for the message.
        entry: Fields of `GpuSpec`.

    Raises:
        ConfigError: If a coefficient is missing, malformed or faster than the data sheet.
    """
    try:
        return GpuSpec.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"calibration of {name}, {where}: {what}") from None


def model(name: str) -> ModelSpec:
    """Return a model's specification.

    Raises:
        ConfigError: If there is none of that name.
    """
    return _find("model", "models.yaml", ModelSpec, name)
