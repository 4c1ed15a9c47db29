"""Multi-head latent attention (MLA) of DeepSeek-V3 and its kin: forms, and times on a GPU.

A token's keys and values are one latent vector, shared by all heads, beside a rotary key. Prompts
expand the latents to keys and values of every head and attend to these; decodes absorb the
expansion into the query and the result (two products a head) and attend to the latents themselves,
so that all query heads read the same bytes. Tensor-parallel GPUs share the heads; each holds the
latents of all tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from servegym.assets.specs import GpuSpec, KernelFit
from servegym.costs.curve import Surface
from servegym.costs.forms import ELEMENT_BYTES, LogTable, Operator, table_of
from servegym.costs.source import Evidence, LatentHeads
from servegym.typing import FloatArray

_Numbers = npt.ArrayLike
_TOKENS = np.unique(np.round(np.geomspace(1, 65536, 97)))
_CHUNKS = np.unique(np.round(np.geomspace(1, 32768, 61)))
_CONTEXTS = np.concatenate(([1e-3], np.geomspace(16, 262144, 36)))
_BATCHES = np.geomspace(1, 2048, 23)
_KV_TOKENS = np.geomspace(1, 2.0**24, 97)
#: Sizes of the benchmarks: those of DeepSeek-V3.
MEASURED = (128, 512, 64)


# ---- forms ----


def prefill(
    chunk: _Numbers, context: _Numbers, shape: LatentHeads, heads: _Numbers, batch: _Numbers = 1.0
) -> Operator:
    """Causal attention over expanded keys and values, as `forms.prefill`; every head has its own.

    Args:
        chunk: New tokens.
        context: Cached tokens.
        shape: Sizes of a head.
        heads: Query heads.
        batch: Equal requests.
    """
    c, h, heads, b = _arrays(chunk, context, heads, batch)
    key, value = shape.head_dim + shape.rope_dim, shape.head_dim
    pairs = b * heads * c * (h + 0.5 * (c + 1.0))
    kv = ELEMENT_BYTES * (key + value) * b * (c + h) * heads
    return Operator(
        flops=2.0 * (key + value) * pairs,
        num_bytes=kv + ELEMENT_BYTES * (key + value) * b * c * heads,
        cold_bytes=np.zeros(c.shape),  # expanded just before
        coordinates={"length": c + 2.0 * h, "heads": b * heads * c / (c + 2.0 * h)},
        seq_heads=np.zeros(c.shape),
    )


def decode(batch: _Numbers, kv_tokens: _Numbers, shape: LatentHeads, heads: _Numbers) -> Operator:
    """One new token each of `batch` sequences over the latents of `kv_tokens` tokens in all.

    A latent is read once for all heads of the GPU, which computes with it as key and as value.
    """
    b, tokens, heads = _arrays(batch, kv_tokens, heads)
    width = shape.latent_dim + shape.rope_dim
    kv = (1.0 if shape.fp8_kv else ELEMENT_BYTES) * width * tokens
    query = ELEMENT_BYTES * b * heads * (width + shape.latent_dim)
    return Operator(
        flops=2.0 * heads * (width + shape.latent_dim) * tokens,
        num_bytes=kv + query,
        cold_bytes=kv,
        coordinates={"context": tokens / b, "batch": b, "heads": heads},
        seq_heads=b * heads,
    )


def absorption(tokens: _Numbers, shape: LatentHeads, heads: _Numbers) -> Operator:
    """The two products a head that stand for the expansion while decoding, in 16 bits."""
    t, heads = _arrays(tokens, heads)
    weights = 2.0 * ELEMENT_BYTES * heads * shape.head_dim * shape.latent_dim
    moved = 2.0 * ELEMENT_BYTES * t * heads * (shape.head_dim + shape.latent_dim)
    return Operator(
        flops=4.0 * t * heads * shape.head_dim * shape.latent_dim,
        num_bytes=weights + moved,
        cold_bytes=weights,
        coordinates={"m": t, "heads": heads},
        seq_heads=np.zeros(t.shape),
    )


def _arrays(*values: _Numbers) -> tuple[FloatArray, ...]:
    return tuple(np.broadcast_arrays(*(np.asarray(v, np.float64) for v in values)))


# ---- times on a GPU ----


def peak_flops(gpu: GpuSpec, *, fp8_kv: bool) -> float:
    """FLOP/s of attention: in eight bits where the cache has them and the GPU can."""
    return gpu.fp8_flops if fp8_kv and gpu.fp8_flops else gpu.bf16_flops


def kernel_fit(gpu: GpuSpec, kernel: str, shape: LatentHeads) -> KernelFit:
    """The fit of `prefill`, `decode` or `absorption`; a prior if not measured on that GPU.

    A prior has the shares of the peaks that ordinary attention reaches there, of the absorption
    those of GEMMs.
    """
    name = kernel if kernel == "absorption" else f"{kernel} {shape.kv_kind}"
    if name in gpu.mla:
        return gpu.mla[name]
    if kernel == "absorption":
        # two launches
        return _prior(gpu.gemm, gpu.gemm.eff_flops, 2.0 * gpu.gemm.c0_s)
    if kernel == "decode":
        return _prior(gpu.decode, gpu.prefill.eff_flops, gpu.decode.c0_s)
    return _prior(gpu.prefill, gpu.prefill.eff_flops, gpu.prefill.c0_s)


def _prior(fit: KernelFit, eff_flops: float, c0_s: float) -> KernelFit:
    return KernelFit(c0_s=c0_s, eff_bytes=fit.eff_bytes, eff_flops=eff_flops, p=fit.p, prior=True)


def prefill_surface(gpu: GpuSpec, shape: LatentHeads) -> Surface:
    """Seconds over chunk and context, expansion not included."""
    fit, peaks, table = _fitted(gpu, "prefill", shape)
    operator = prefill(_CHUNKS[:, None], _CONTEXTS[None, :], shape, shape.heads)
    seconds = operator.measured_s(fit, table, *peaks)
    if table is not None:
        # a few tokens over a long context fill few multiprocessors: as one tile walks its keys
        longest = table.axes["length"][-1]
        keys = _CHUNKS[:, None] + _CONTEXTS[None, :]
        one = prefill(np.minimum(keys, longest), 0.0, shape, 1.0)
        chain_s = one.measured_s(fit, table, *peaks) * np.maximum(keys / longest, 1.0)
        seconds = np.maximum(seconds, chain_s)
    return Surface.through(_CHUNKS, _CONTEXTS, seconds)


def decode_surface(gpu: GpuSpec, shape: LatentHeads) -> Surface:
    """Seconds over sequences and tokens they attend to, absorption not included."""
    fit, peaks, table = _fitted(gpu, "decode", shape)
    operator = decode(_BATCHES[:, None], _KV_TOKENS[None, :], shape, shape.heads)
    seconds = operator.measured_s(fit, table, *peaks)
    seconds = np.maximum(seconds, fit.c0_s + operator.floor_s(fit, *peaks))
    # kernels that walk along a sequence take longer for one than for several with as many tokens
    return Surface.through(_BATCHES, _KV_TOKENS, seconds, growing_x=False)


def absorption_surface(gpu: GpuSpec, shape: LatentHeads) -> Surface:
    """Seconds over tokens; the second size does not matter."""
    fit, peaks, table = _fitted(gpu, "absorption", shape)
    operator = absorption(_TOKENS, shape, shape.heads)
    seconds = operator.measured_s(fit, table, *peaks)
    seconds = np.maximum(seconds, operator.floor_s(fit, *peaks))
    return Surface.through(_TOKENS, np.array([1.0, 2.0]), np.stack([seconds, seconds], axis=1))


def _fitted(
    gpu: GpuSpec, kernel: str, shape: LatentHeads
) -> tuple[KernelFit, tuple[float, float], LogTable | None]:
    fit = kernel_fit(gpu, kernel, shape)
    flops = peak_flops(gpu, fp8_kv=shape.fp8_kv and kernel != "absorption")
    return fit, (flops, gpu.memory_bytes_per_s), table_of(fit)


def latent_evidence(gpu: GpuSpec, shape: LatentHeads) -> list[Evidence]:
    """What stands behind prefill, decode and absorption."""
    found = []
    sizes = (shape.head_dim, shape.latent_dim, shape.rope_dim)
    for kernel in ("prefill", "decode", "absorption"):
        fit = kernel_fit(gpu, kernel, shape)
        operator = f"latent attention, {kernel}, {shape.heads} heads"
        if fit.prior:
            note = "not measured on this GPU: shares of ordinary attention and GEMMs"
            found.append(Evidence(operator, "prior", note))
        elif sizes != MEASURED:
            note = f"fitted on heads of {MEASURED[0]} over latents of {MEASURED[1]} elements"
            found.append(Evidence(operator, "extrapolated", note, fit.error))
        else:
            found.append(Evidence(operator, "interpolated", fit.source, fit.error))
    return found
