"""Measured times of multi-head latent attention, from the package aiconfigurator-core.

Its tables of TensorRT-LLM hold the kernels alone: attention of prompts over expanded keys and
values, attention of decodes over latents, and the two products of the absorption. Held out is
every second number of heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.costs import mla
from servegym.costs.measurements import Measurements
from servegym.costs.mla import MEASURED
from servegym.costs.package import Rows, newest_table, where
from servegym.costs.source import LatentHeads
from servegym.typing import BoolArray, FloatArray

_BACKENDS = ("trtllm",)
#: Precision of the cache as the tables name it.
_KV = {"bf16": "bfloat16", "fp8": "fp8"}


def package_prefill(system: str, kv: str) -> Measurements | None:
    """Prompts without a cached prefix; None if the package has none of the GPU.

    Args:
        system: GPU, as the package calls it.
        kv: Precision of the cache, `bf16` or `fp8`.
    """
    found = _rows(system, "mla", "context_mla_perf.parquet", kv)
    if found is None:
        return None
    t, source = found
    operator = mla.prefill(t["isl"], 0.0, _shape(kv), t["num_heads"], t["batch_size"])
    return Measurements(operator, 1e-3 * t["latency"], _every_second(t["num_heads"]), source)


def package_decode(system: str, kv: str) -> Measurements | None:
    """One token a sequence, up to 1,024 sequences; None if the package has none of the GPU.

    Args:
        system: GPU, as the package calls it.
        kv: Precision of the cache, `bf16` or `fp8`.
    """
    found = _rows(system, "mla", "generation_mla_perf.parquet", kv)
    if found is None:
        return None
    t, source = found
    tokens = t["batch_size"] * (t["step"] + 1.0)
    operator = mla.decode(t["batch_size"], tokens, _shape(kv), t["num_heads"])
    return Measurements(operator, 1e-3 * t["latency"], _every_second(t["num_heads"]), source)


def package_absorption(system: str) -> Measurements | None:
    """Both products, in 16 bits, of the sizes at which both were measured.

    Args:
        system: GPU, as the package calls it.
    """
    found = newest_table(system, "mla_bmm", "mla_bmm_perf.parquet", (*_BACKENDS, "sglang"))
    if found is None:
        return None
    rows, source = where(found[0], bmm_dtype="bfloat16"), found[1]
    before, after = (_seconds(where(rows, op_name=f"mla_gen_{part}")) for part in ("pre", "post"))
    both = sorted(before.keys() & after.keys())
    m, heads = np.array(both, np.float64).T
    seconds = np.array([before[key] + after[key] for key in both])
    operator = mla.absorption(m, _shape("bf16"), heads)
    return Measurements(operator, seconds, _every_second(heads), source)


@dataclass(frozen=True)
class Modules:
    """Times of whole attention modules: projections, norms, rotary embedding and attention.

    Attributes:
        heads: `float64[N]`.
        batch: Prompts of `tokens` each, or sequences that decode, `float64[N]`.
        tokens: Of a prompt; of a decoding sequence those it attends to, `float64[N]`.
        seconds: Measured, `float64[N]`.
    """

    heads: FloatArray
    batch: FloatArray
    tokens: FloatArray
    seconds: FloatArray


def package_modules(system: str, phase: str, weights: str, kv: str) -> Modules | None:
    """TensorRT-LLM's attention modules of DeepSeek-V3; None if the package has none of the GPU.

    Args:
        system: GPU, as the package calls it.
        phase: `prefill` or `decode`.
        weights: Precision of the projections, `bf16` or `fp8-block`.
        kv: Precision of the cache, `bf16` or `fp8`.
    """
    file = {"prefill": "context", "decode": "generation"}[phase]
    found = _rows(system, "mla", f"mla_{file}_module_perf.parquet", kv)
    if found is None:
        return None
    t = where(found[0], gemm_type={"bf16": "bfloat16", "fp8-block": "fp8_block"}[weights])
    tokens = t["isl"] if phase == "prefill" else t["step"] + 1.0
    return Modules(t["num_heads"], t["batch_size"], tokens, 1e-3 * t["latency"])


def _rows(system: str, folder: str, file: str, kv: str) -> tuple[Rows, str] | None:
    found = newest_table(system, folder, file, _BACKENDS)
    if found is None:
        return None
    rows = where(found[0], kv_cache_dtype=_KV[kv])
    return (rows, f"{found[1]}, {kv} KV cache") if len(rows["latency"]) else None


def _seconds(rows: Rows) -> dict[tuple[float, float], float]:
    keys = zip(rows["num_tokens"].tolist(), rows["num_heads"].tolist(), strict=True)
    return dict(zip(keys, (1e-3 * rows["latency"]).tolist(), strict=True))


def _shape(kv: str) -> LatentHeads:
    head_dim, latent_dim, rope_dim = MEASURED
    return LatentHeads(1, head_dim, latent_dim, rope_dim, fp8_kv=kv == "fp8")


def _every_second(heads: FloatArray) -> BoolArray:
    """Every second number of heads, the largest not among them."""
    families = np.unique(heads, return_inverse=True)[1].ravel()
    return np.asarray((families.max() - families) % 2 == 1)
