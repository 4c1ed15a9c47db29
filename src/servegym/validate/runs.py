"""Real runs read from a folder: engine settings, per-request timestamps, time series."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.errors import ConfigError, WorkloadError
from servegym.typing import FloatArray, IntArray
from servegym.validate.names import known_gpu, known_model, known_precision
from servegym.workloads.records import columns_of, records

_META = "_meta.json"
_REQUESTS = "_requests.csv.gz"
_SERIES = "_timeseries.csv.gz"


@dataclass(frozen=True)
class RealRun:
    """One measured run of an engine.

    Attributes:
        name: File name without its endings.
        gpu: Name in `assets/gpus.yaml`.
        model: Name in `assets/models.yaml`.
        precision: Of the weights, `bf16`, `fp8` or `fp4`.
        kv_precision: Of the KV cache.
        engine: Engine and version.
        tp: Tensor-parallel degree.
        dp: Data-parallel ranks.
        expert_parallel: Whether experts are split over all ranks.
        max_num_seqs: Running requests of a rank.
        max_num_batched_tokens: Token budget of a rank's step.
        block_size: Tokens in a KV block.
        num_blocks: KV blocks of a rank as the engine logged them, None if it did not.
        memory_fraction: `gpu_memory_utilization`.
        prefix_caching: Whether it was on.
        arrival_s: Ascending, first at 0, `float64[n]`.
        prompt_tokens: `int64[n]`.
        output_tokens: `int64[n]`.
        ttft_s: `float64[n]`.
        e2e_s: `float64[n]`.
        tpot_s: NaN for requests of one token, `float64[n]`.
        series: `t, running, waiting, kv_cache_pct`, `float64[m]` each; empty if not recorded.
    """

    name: str
    gpu: str
    model: str
    precision: str
    kv_precision: str
    engine: str
    tp: int
    dp: int
    expert_parallel: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int | None
    memory_fraction: float
    prefix_caching: bool
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    ttft_s: FloatArray
    e2e_s: FloatArray
    tpot_s: FloatArray
    series: dict[str, FloatArray]


def read_runs(folder: Path) -> tuple[list[RealRun], list[tuple[str, str]]]:
    """Read every run in a folder.

    Args:
        folder: Holds `<engine>_<gpu>_<model>_meta.json`, `..._requests.csv.gz` and perhaps
            `..._timeseries.csv.gz` of each run.

    Returns:
        The runs, and `(file name, reason)` of every other file in the folder.

    Raises:
        ConfigError: If there is no such folder, no run in it, or a GPU or model is unknown.
        WorkloadError: If a file is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder at {folder}: give one with <run>{_META} and <run>{_REQUESTS}")
    metas = sorted(folder.glob(f"*{_META}"))
    if not metas:
        raise ConfigError(f"no run in {folder}: a run is <engine>_<gpu>_<model>{_META} and others")
    runs = [read_run(meta) for meta in metas]
    used = {run.name + ending for run in runs for ending in (_META, _REQUESTS, _SERIES)}
    rest = [path.name for path in sorted(folder.iterdir()) if path.name not in used]
    return runs, [(name, "not part of a run with timestamps per request") for name in rest]


def read_run(meta_path: Path) -> RealRun:
    """Read one run by the path of its `_meta.json`.

    Raises:
        ConfigError: If the GPU or the model is unknown.
        WorkloadError: If a file is missing or damaged.
    """
    name = meta_path.name.removesuffix(_META)
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        settings = dict(meta["engine_kwargs"])
        label = str(meta["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkloadError(
            f"{meta_path.name} is no description of a run: it needs `model` and `engine_kwargs`"
        ) from error
    parts = name.split("_")
    if len(parts) < 3:
        raise ConfigError(f"{meta_path.name} must be named <engine>_<gpu>_<model>{_META}")
    cache: dict[str, Any] = meta.get("kv_cache") or {}
    rows = _columns(meta_path.with_name(name + _REQUESTS))
    need = ("arrival_s", "input_toks", "output_toks", "ttft_s", "e2e_s")
    missing = [column for column in need if column not in rows]
    if missing:
        raise WorkloadError(f"{name}{_REQUESTS} has no column {missing[0]}")
    order = np.argsort(rows["arrival_s"], kind="stable")
    arrival, ttft, e2e = (rows[c][order] for c in ("arrival_s", "ttft_s", "e2e_s"))
    prompt, output = (rows[c][order].astype(np.int64) for c in ("input_toks", "output_toks"))
    series_path = meta_path.with_name(name + _SERIES)
    caching = cache.get("enable_prefix_caching")
    return RealRun(
        name=name,
        gpu=known_gpu(parts[1]),
        model=known_model(label),
        precision=known_precision(
            str(settings.get("quantization") or settings.get("dtype") or "auto")
        ),
        kv_precision=known_precision(str(settings.get("kv_cache_dtype") or "auto")),
        engine=f"vLLM {meta.get('vllm_version', '')}".strip(),
        tp=int(settings.get("tensor_parallel_size") or 1),
        dp=int(settings.get("data_parallel_size") or 1),
        expert_parallel=bool(settings.get("enable_expert_parallel")),
        max_num_seqs=int(settings.get("max_num_seqs") or 256),
        max_num_batched_tokens=int(settings.get("max_num_batched_tokens") or 2048),
        block_size=int(cache.get("block_size") or 16),
        num_blocks=cache.get("num_gpu_blocks"),
        memory_fraction=float(cache.get("gpu_memory_utilization") or 0.9),
        prefix_caching=True if caching is None else bool(caching),
        arrival_s=arrival - arrival[0],
        prompt_tokens=prompt,
        output_tokens=output,
        ttft_s=ttft,
        e2e_s=e2e,
        tpot_s=tpot(ttft, e2e, output),
        series=_columns(series_path) if series_path.is_file() else {},
    )


def tpot(ttft_s: FloatArray, e2e_s: FloatArray, output_tokens: IntArray) -> FloatArray:
    """Return seconds per output token after the first, NaN where there is only one."""
    gaps = np.where(output_tokens > 1, output_tokens - 1, 1)
    return np.where(output_tokens > 1, (e2e_s - ttft_s) / gaps, np.nan)


def _columns(path: Path) -> dict[str, FloatArray]:
    """Read the numeric columns of a CSV file; others are left out."""
    rows = [columns_of(f"{path.name}, line {line}", row) for line, row in records(path)]
    if not rows:
        raise WorkloadError(f"{path.name} has no rows")
    columns: dict[str, FloatArray] = {}
    for name in rows[0]:
        try:
            columns[name] = np.array([float(str(row[name])) for row in rows])
        except (KeyError, ValueError):
            continue
    return columns
