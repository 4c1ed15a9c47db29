"""Tables of public kernel profiles as measurements, and which half of them no fit may see.

The tables are extracts of public profiles (AIConfigurator, Vidur, LLMServingSim) in Parquet files.
Held out is every second *shape family* (matrix, head counts, mixture), so that the error is that
of a shape never measured; where a device has one family only, every second point of its grid.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from servegym.assets.specs import GpuSpec
from servegym.costs import forms
from servegym.costs.forms import WEIGHT_BYTES, Operator
from servegym.costs.measurements import Measurements
from servegym.costs.package import expert_rows, newest_table, where
from servegym.costs.source import Precision, Routing
from servegym.engines import EngineName
from servegym.typing import BoolArray, FloatArray


def aic_gemm(folder: Path, system: str, dtype: str) -> Measurements:
    """GEMMs of AIConfigurator, `dtype` bf16 or fp8; A100's in bf16 are those of SGLang."""
    sglang = system == "a100_sxm"
    t = _table(folder / ("aic_gemm_sglang_bf16.parquet" if sglang else "aic_gemm_vllm.parquet"))
    t = _rows(t, device=system, gemm_dtype={"bf16": "bfloat16"}.get(dtype, dtype))
    n, k = t["n"], t["k"]
    held_out = (rank(n) + rank(k)) % 2 == 1
    return Measurements(
        forms.gemm(t["m"], n, k, 1.0 if dtype == "fp8" else 2.0),
        _seconds(t),
        held_out,
        f"AIConfigurator kernel tables ({'SGLang' if sglang else 'vLLM'} backend)",
    )


def aic_prefill(folder: Path, system: str, window: int = 0, head_dim: int = 128) -> Measurements:
    """Prefill attention of AIConfigurator, bf16; no cached prefix."""
    t = _rows(
        _table(folder / "aic_context_attention_vllm.parquet"),
        device=system,
        kv_cache_dtype="bfloat16",
        head_dim=head_dim,
        window_size=window,
    )
    heads, kv_heads = t["num_heads"], t["num_key_value_heads"]
    return Measurements(
        forms.prefill(t["isl"], 0.0, heads, kv_heads, float(head_dim), t["batch_size"]),
        _seconds(t),
        second_family(heads / kv_heads, heads),
        "AIConfigurator kernel tables (vLLM backend)",
    )


def aic_decode(folder: Path, system: str, window: int = 0, head_dim: int = 128) -> Measurements:
    """Decode attention of AIConfigurator, bf16, up to 1,024 sequences."""
    t = _rows(
        _table(folder / "aic_generation_attention_vllm.parquet"),
        device=system,
        kv_cache_dtype="bfloat16",
        head_dim=head_dim,
        window_size=window,
    )
    few = t["batch_size"] <= 1024
    t = {name: column[few] for name, column in t.items()}
    heads, kv_heads = t["num_heads"], t["num_key_value_heads"]
    context = t["step"] + 1.0
    seen = np.minimum(context, window) if window else context
    return Measurements(
        forms.decode(t["batch_size"], t["batch_size"] * seen, heads, kv_heads, float(head_dim)),
        _seconds(t),
        second_family(heads / kv_heads, heads),
        "AIConfigurator kernel tables (vLLM backend)",
    )


def aic_experts(folder: Path, system: str, dtype: str, routing: Routing) -> Measurements:
    """Grouped experts of AIConfigurator on one expert-parallel rank.

    fp8 is that of published checkpoints of mixtures, one scale a block of weights, where a GPU
    has a table of it; else one scale a tensor.
    """
    t = _rows(
        _table(folder / "aic_moe_vllm.parquet"),
        device=system,
        distribution={"uniform": "balanced", "skewed": "power_law_1.2"}[routing],
        moe_ep_size=1,
    )
    blocks = dtype == "fp8" and "fp8_block" in t["moe_dtype"]
    t = _rows(t, moe_dtype="fp8_block" if blocks else {"bf16": "bfloat16"}.get(dtype, dtype))
    t["width"] = t["inter_size"] / np.maximum(t["moe_tp_size"], 1)
    note = ", scales a block" if blocks else ""
    source = f"AIConfigurator kernel tables (vLLM backend), {routing} routing{note}"
    return _experts(t, 1e-6 * t["latency_us"], 1.0 if dtype == "fp8" else 2.0, routing, source)


def package_experts(
    gpu: GpuSpec, precision: Precision, routing: Routing, engine: EngineName = "vllm"
) -> Measurements | None:
    """The same from the tables in the package aiconfigurator-core; None if it has none."""
    fp4_units = gpu.fp4_flops > 0
    found = expert_rows(gpu.aic_system, precision, routing, fp4_units=fp4_units, engine=engine)
    if found is None:
        return None
    rows, source = found
    source = f"{source}, {routing} routing"
    return _experts(rows, 1e-3 * rows["latency"], WEIGHT_BYTES[precision], routing, source)


def package_fp4_gemm(gpu: GpuSpec) -> Measurements | None:
    """GEMMs in nvfp4 from the tables in the package; None if it has none of the GPU."""
    read = newest_table(gpu.aic_system, "gemm", "gemm_perf.parquet")
    if read is None:
        return None
    t, source = where(read[0], gemm_dtype="nvfp4"), f"{read[1]}, nvfp4"
    if not len(t["latency"]):
        return None
    held_out = (rank(t["n"]) + rank(t["k"])) % 2 == 1
    operator = forms.gemm(t["m"], t["n"], t["k"], WEIGHT_BYTES["fp4"])
    return Measurements(operator, 1e-3 * t["latency"], held_out, source)


def _experts(
    t: dict[str, FloatArray],
    seconds: FloatArray,
    weight_bytes: float,
    routing: Routing,
    source: str,
) -> Measurements:
    shape = (t["hidden_size"], t["width"], t["num_experts"], t["topk"])
    even = routing == "uniform"
    return Measurements(
        forms.experts(t["num_tokens"], *shape, 3.0, weight_bytes, even=even),
        seconds,
        second_family(*shape),
        source,
    )


def aic_all_gather(folder: Path, system: str, num_gpus: int) -> tuple[FloatArray, FloatArray]:
    """All-gathers and reduce-scatters by NCCL of 16-bit values.

    Returns:
        Bytes in all and seconds of each, `float64[N]`.
    """
    t = _rows(_table(folder / "aic_comm.parquet"), device=system, impl="NCCL", dtype="half")
    t = _rows(t, num_gpus=num_gpus)
    mine = np.isin(t["op"], ("all_gather", "reduce_scatter"))
    return 2.0 * t["message_size"][mine], _seconds(t)[mine]


def vidur_gemm(folder: Path, device: str) -> Measurements:
    """GEMMs of Vidur's model profiles: QKV, output, gate with up, down."""
    t = _rows(_table(folder / "vidur_mlp.parquet"), device=device)
    tp = t["num_tensor_parallel_workers"]
    hidden, wide = t["n_embd"], t["n_expanded_embd"] / tp
    size = hidden / t["n_head"]
    heads, kv_heads = t["n_head"] / tp, np.maximum(1, t["n_kv_head"] / tp)
    shapes = [
        ("attn_pre_proj_ms", (heads + 2 * kv_heads) * size, hidden),
        ("attn_post_proj_ms", hidden, heads * size),
        ("mlp_up_proj_ms", 2 * wide, hidden),
        ("mlp_down_proj_ms", hidden, wide),
    ]
    m = np.concatenate([t["num_tokens"]] * 4)
    n = np.concatenate([s[1] for s in shapes])
    k = np.concatenate([s[2] for s in shapes])
    seconds = 1e-3 * np.concatenate([t[s[0]] for s in shapes])
    good = np.isfinite(seconds) & (seconds > 0)
    return Measurements(
        forms.gemm(m[good], n[good], k[good], 2.0),
        seconds[good],
        second_family(n[good], k[good]),
        "Vidur MLP profiles",
    )


#: GEMMs of Llama-3.1-8B on one GPU: n, k.
_LLAMA_8B = {
    "qkv_proj": (6144, 4096),
    "o_proj": (4096, 4096),
    "gate_up_proj": (28672, 4096),
    "down_proj": (4096, 14336),
    "lm_head": (128256, 4096),
}


def llmss_gemm(folder: Path, device: str) -> Measurements:
    """GEMMs of LLMServingSim's profile of Llama-3.1-8B (vLLM 0.19)."""
    rows: list[tuple[float, float, float, float]] = []
    held_out: list[bool] = []
    for file, size in (("llmss_dense", "tokens"), ("llmss_per_sequence", "sequences")):
        t = _rows(_table(folder / f"{file}.parquet"), device=device, tp=1, model=_LLAMA)
        for index, (layer, (n, k)) in enumerate(_LLAMA_8B.items()):
            mine = t["layer"] == layer
            m = t[size][mine]
            rows += [(a, n, k, 1e-6 * b) for a, b in zip(m, t["time_us"][mine], strict=True)]
            held_out += ((rank(m) + index) % 2 == 1).tolist()
    m, n, k, seconds = np.array(rows, np.float64).T
    return Measurements(forms.gemm(m, n, k, 2.0), seconds, np.array(held_out), _LLMSS)


def llmss_prefill(folder: Path, device: str) -> Measurements:
    """Chunks over cached tokens of LLMServingSim's profile of Llama-3.1-8B."""
    t = _rows(_table(folder / "llmss_attention.parquet"), device=device, tp=1, model=_LLAMA)
    pure = (t["n_decode"] == 0) & (t["prefill_chunk"] > 0)
    chunk, context = t["prefill_chunk"][pure], t["kv_prefill"][pure]
    return Measurements(
        forms.prefill(chunk, context, 32, 8, 128.0),
        1e-6 * t["time_us"][pure],
        (rank(chunk) + rank(context)) % 2 == 1,
        _LLMSS,
    )


def llmss_decode(folder: Path, device: str, model: str = "", tp: int = 1) -> Measurements:
    """Decode attention of LLMServingSim's profiles; see `llmss_mixed`."""
    t = _rows(
        _table(folder / "llmss_attention.parquet"), device=device, tp=tp, model=model or _LLAMA
    )
    pure = (t["prefill_chunk"] == 0) & (t["n_decode"] > 0)
    batch, context = t["n_decode"][pure], t["kv_decode"][pure]
    return Measurements(
        forms.decode(batch, batch * np.maximum(context, 1), *_heads(model, tp), 128.0),
        1e-6 * t["time_us"][pure],
        (rank(batch) + rank(context)) % 2 == 1,
        _LLMSS,
    )


def llmss_mixed(
    folder: Path, device: str, gpu: GpuSpec, model: str = "", tp: int = 1
) -> tuple[Measurements, FloatArray, FloatArray]:
    """Chunks with decodes in one call, of LLMServingSim's profiles (vLLM 0.19).

    Args:
        folder: Of the tables.
        device: Name in them.
        gpu: Its cache and multiprocessors.
        model: Profiled model, Llama-3.1-8B by default, or Qwen3-30B-A3B-Instruct-2507.
        tp: Tensor-parallel degree, 1 or 2.

    Returns:
        Decodes as the operator, seconds of whole calls; the seconds that their chunk takes
        alone, measured, `float64[N]`; and their empty tiles, `float64[N]`.
    """
    t = _rows(
        _table(folder / "llmss_attention.parquet"), device=device, tp=tp, model=model or _LLAMA
    )
    alone = t["n_decode"] == 0
    chunks = zip(t["prefill_chunk"][alone], t["kv_prefill"][alone], strict=True)
    chunk_s = dict(zip(chunks, 1e-6 * t["time_us"][alone], strict=True))
    mixed = (t["n_decode"] > 0) & (t["prefill_chunk"] > 0)
    t = {name: column[mixed] for name, column in t.items()}
    batch, context = t["n_decode"], np.maximum(t["kv_decode"], 1.0)
    shape = (*_heads(model, tp), 128.0)
    operator = forms.unpacked_decode(batch, batch * context, *shape, gpu.l2_bytes, gpu.num_sms)
    held_out = (rank(batch) + rank(context)) % 2 == 1
    beside = zip(t["prefill_chunk"], t["kv_prefill"], strict=True)
    return (
        Measurements(operator, 1e-6 * t["time_us"], held_out, _LLMSS),
        np.array([chunk_s[key] for key in beside]),
        forms.empty_tiles(batch, t["prefill_chunk"], shape[0]),
    )


def llmss_streamed_decode(folder: Path, device: str) -> Measurements:
    """Decode attention of both profiled models, over one GPU and two."""
    shapes = [(model, tp) for model in (_LLAMA, _QWEN) for tp in (1, 2)]
    parts = [llmss_decode(folder, device, *shape) for shape in shapes]
    both = "LLMServingSim profiles of Llama-3.1-8B and Qwen3-30B-A3B (vLLM 0.19)"
    return replace(_joined(parts), source=both)


def _heads(model: str, tp: int) -> tuple[float, float]:
    """Query and KV heads of a profiled model on one GPU."""
    return 32 / tp, (4 if model == _QWEN else 8) / tp


def _joined(parts: list[Measurements]) -> Measurements:
    def column(name: str) -> FloatArray:
        return np.concatenate([getattr(part.operator, name) for part in parts])

    at = [part.operator.coordinates for part in parts]
    return Measurements(
        Operator(
            flops=column("flops"),
            num_bytes=column("num_bytes"),
            cold_bytes=column("cold_bytes"),
            coordinates={name: np.concatenate([c[name] for c in at]) for name in at[0]},
            seq_heads=column("seq_heads"),
        ),
        np.concatenate([part.seconds for part in parts]),
        np.concatenate([part.held_out for part in parts]),
        parts[0].source,
    )


def llmss_elementwise(folder: Path, device: str) -> Measurements:
    """Two norms, rotary embedding and activation of a layer of Llama-3.1-8B."""
    t = _rows(_table(folder / "llmss_dense.parquet"), device=device, tp=1, model=_LLAMA)
    parts = {}
    for layer in ("layernorm", "rotary_emb", "act_fn"):
        mine = t["layer"] == layer
        parts[layer] = dict(zip(t["tokens"][mine], t["time_us"][mine], strict=True))
    tokens = np.array(sorted(parts["layernorm"]))
    micros = [
        2 * parts["layernorm"][m] + parts["rotary_emb"][m] + parts["act_fn"][m] for m in tokens
    ]
    return Measurements(
        forms.elementwise(tokens, 4096, (32 + 8) * 128, 14336),
        1e-6 * np.array(micros),
        rank(tokens) % 2 == 1,
        _LLMSS,
    )


_LLAMA = "meta-llama/Llama-3.1-8B"
_QWEN = "Qwen/Qwen3-30B-A3B-Instruct-2507"
_LLMSS = "LLMServingSim profile of Llama-3.1-8B (vLLM 0.19)"


def _table(path: Path) -> dict[str, FloatArray]:
    from pyarrow import parquet

    table = parquet.read_table(path)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _rows(table: dict[str, FloatArray], **equal: object) -> dict[str, FloatArray]:
    keep = np.ones(len(next(iter(table.values()))), bool)
    for name, value in equal.items():
        keep &= np.asarray(table[name] == value)
    rows = {name: column[keep] for name, column in table.items()}
    return {
        name: column.astype(np.float64) if np.issubdtype(column.dtype, np.number) else column
        for name, column in rows.items()
    }


def _seconds(table: dict[str, FloatArray]) -> FloatArray:
    return 1e-6 * table["latency_us"]


def rank(values: FloatArray) -> npt.NDArray[np.int64]:
    """Index of each value among the sorted distinct ones."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def second_family(*columns: FloatArray) -> BoolArray:
    """Every second family, in the order of its columns."""
    families = np.unique(np.stack(columns, axis=1), axis=0, return_inverse=True)[1]
    return np.asarray(families.ravel() % 2 == 1)
