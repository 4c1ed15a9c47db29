"""Measured kernels by number format and by engine, from the tables in aiconfigurator-core.

GEMMs on operands that are fp8 or fp4 already are no table of their own: the tables time a linear
layer, which quantises its activations first. What that takes is measured as well, at every size,
and is taken off.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from kernel_tables.profiles import rank, second_family
from servegym.assets.specs import GpuSpec
from servegym.costs import forms
from servegym.costs.forms import WEIGHT_BYTES
from servegym.costs.measurements import Measurements
from servegym.costs.package import Rows, newest_table, where
from servegym.engines import EngineName
from servegym.typing import FloatArray

_GEMM_FILE = "gemm_perf.parquet"
#: Query heads a KV head; beyond, TensorRT-LLM changes to a kernel up to ten times slower, and no
#: model has that many.
LARGEST_GROUP = 32
#: Least share of a linear layer that is left to its GEMM; only noise makes it less.
_LEAST_SHARE = 0.1


def static_gemm(gpu: GpuSpec, precision: Literal["fp8", "fp4"]) -> Measurements | None:
    """GEMMs on operands in fp8 or fp4: linear layers less the quantisation of activations.

    fp8: TensorRT-LLM's linear layer with dynamic scales, less its two measured steps, the scale
    and the cast. (vLLM's was timed outside `torch.compile`, with a cast in several kernels that
    no engine runs.) fp4: the newest of vLLM or SGLang, less a cast to fp8, which reads as much.

    Args:
        gpu: The GPU.
        precision: Of the operands.

    Returns:
        None if the package has none of the GPU.
    """
    steps = [
        newest_table(gpu.aic_system, "quantize", f"{step}_perf.parquet", ("trtllm",))
        for step in ("scale_matrix", "computescale")
    ]
    backends = ("trtllm",) if precision == "fp8" else ("vllm", "sglang")
    read = newest_table(gpu.aic_system, "gemm", _GEMM_FILE, backends)
    if read is None or steps[0] is None or steps[1] is None:
        return None
    rows = where(read[0], gemm_dtype="fp8" if precision == "fp8" else "nvfp4")
    if not len(rows["latency"]):
        return None
    taken = _at(steps[0][0], rows)
    if precision == "fp8":
        taken = taken + _at(steps[1][0], rows)
    alone = np.maximum(rows["latency"] - taken, _LEAST_SHARE * rows["latency"])
    note = f"{read[1]}, {precision}, less the quantisation of activations"
    return _gemm(rows, alone, WEIGHT_BYTES[precision], note)


def block_gemm(gpu: GpuSpec, engine: EngineName = "sglang") -> Measurements | None:
    """GEMMs in fp8 with a scale a block of 128 x 128 weights, activations quantised in them.

    DeepGEMM as SGLang calls it stands for vLLM as well, whose own table was timed without CUDA
    graphs: 60 to 180 us at any size, the time to launch from Python.

    Args:
        gpu: The GPU.
        engine: Whose kernels.

    Returns:
        None if the package has none of the GPU.
    """
    read = newest_table(gpu.aic_system, "gemm", _GEMM_FILE, (engine,))
    if read is None:
        return None
    rows = where(read[0], gemm_dtype="fp8_block")
    if not len(rows["latency"]):
        return None
    return _gemm(rows, rows["latency"], WEIGHT_BYTES["fp8"], f"{read[1]}, fp8_block")


def quantise(gpu: GpuSpec) -> Measurements | None:
    """Casts of activations to fp8 by a given scale; None if the package has none of the GPU."""
    read = newest_table(gpu.aic_system, "quantize", "scale_matrix_perf.parquet", ("trtllm",))
    if read is None:
        return None
    rows = read[0]
    return Measurements(
        forms.quantise(rows["m"], rows["k"]),
        1e-3 * rows["latency"],
        (rank(rows["m"]) + rank(rows["k"])) % 2 == 1,
        read[1],
    )


def attention(
    gpu: GpuSpec, engine: EngineName, name: Literal["prefill", "decode"], kv: Literal["bf16", "fp8"]
) -> Measurements | None:
    """Attention of an engine with heads of 128 elements and no window.

    Over an 8-bit cache TensorRT-LLM prefills in fp8, the others in 16 bits where both were timed.

    Args:
        gpu: The GPU.
        engine: Whose kernels.
        name: `prefill`, from the first token of a prompt, or `decode`, up to 1,024 sequences.
        kv: Of the cache.

    Returns:
        None if the package has none.
    """
    file = {"prefill": "context", "decode": "generation"}[name] + "_attention_perf.parquet"
    read = newest_table(gpu.aic_system, "attention", file, (engine,))
    if read is None:
        return None
    rows = where(read[0], kv_cache_dtype="fp8" if kv == "fp8" else "bfloat16")
    rows = where(rows, head_dim=128.0, window_size=0.0)
    if "attn_dtype" in rows and name == "prefill":
        wide = engine != "trtllm" or kv == "bf16"
        rows = where(rows, attn_dtype="bfloat16" if wide else "fp8")
    group = rows["num_heads"] / rows["num_key_value_heads"]
    keep = (rows["batch_size"] <= 1024) & (group <= LARGEST_GROUP)
    rows = {column: values[keep] for column, values in rows.items()}
    if len(rows["latency"]) < 500:
        return None
    heads, kv_heads, size = rows["num_heads"], rows["num_key_value_heads"], rows["batch_size"]
    kv_bytes = 1.0 if kv == "fp8" else 2.0
    if name == "prefill":
        operator = forms.prefill(rows["isl"], 0.0, heads, kv_heads, 128.0, size, kv_bytes=kv_bytes)
    else:
        tokens = size * (rows["step"] + 1.0)
        operator = forms.decode(size, tokens, heads, kv_heads, 128.0, kv_bytes=kv_bytes)
    held_out = second_family(heads / kv_heads, heads)
    return Measurements(operator, 1e-3 * rows["latency"], held_out, f"{read[1]}, {kv} KV cache")


def all_reduce(
    gpu: GpuSpec, engine: EngineName, num_gpus: int
) -> tuple[FloatArray, FloatArray] | None:
    """All-reduces of 16-bit values by an engine's own kernels, captured in CUDA graphs.

    Args:
        gpu: The GPU.
        engine: Whose.
        num_gpus: GPUs.

    Returns:
        Bytes and seconds of each, `float64[N]`; None if the package has none.
    """
    file = "custom_allreduce_perf.parquet"
    read = newest_table(gpu.aic_system, "comm", file, (engine,))
    if read is None:
        return None
    rows = where(read[0], num_gpus=float(num_gpus))
    if "backend" in rows:
        rows = where(rows, backend=f"{engine}_graph")
    if not len(rows["latency"]):
        return None
    return 2.0 * rows["message_size"], 1e-3 * rows["latency"]  # sizes are elements


def _gemm(rows: Rows, millis: FloatArray, weight_bytes: float, source: str) -> Measurements:
    held_out = (rank(rows["n"]) + rank(rows["k"])) % 2 == 1
    operator = forms.gemm(rows["m"], rows["n"], rows["k"], weight_bytes)
    return Measurements(operator, 1e-3 * millis, held_out, source)


def _at(step: Rows, rows: Rows) -> FloatArray:
    """Times of a step of quantisation at the rows' activations, all of which were measured."""
    found = {(m, k): t for m, k, t in zip(step["m"], step["k"], step["latency"], strict=True)}
    return np.array([found[mk] for mk in zip(rows["m"], rows["k"], strict=True)])
