"""Rows of the operator tables in the package aiconfigurator-core."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from servegym.costs.source import Precision, Routing
from servegym.engines import EngineName
from servegym.typing import FloatArray

_PACKAGE = "aiconfigurator_core"
_ROUTINGS = {"uniform": "balanced", "skewed": "power_law_1.2"}
Rows = dict[str, FloatArray]


def tables_installed() -> bool:
    """Whether the optional package with the tables is there."""
    return find_spec(_PACKAGE) is not None


@lru_cache(maxsize=64)
def newest_table(
    system: str, operator: str, file: str, backends: tuple[str, ...] = ("vllm", "sglang")
) -> tuple[Rows, str] | None:
    """Rows of the first backend's newest table, or of another that has twice as many.

    Args:
        system: GPU, as the package calls it.
        operator: Folder of the table.
        file: Of the table.
        backends: In order of preference.

    Returns:
        Columns, and where they are from; None if there is no such table.
    """
    spec = find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / "systems" / "data" / system / operator
    best: tuple[Rows, str] | None = None
    for backend in backends:
        versions = [p for p in (root / backend).glob("*") if (p / file).is_file()]
        if not versions:
            continue
        # a later version may hold an addendum only
        sizes = {p: (p / file).stat().st_size for p in versions}
        whole = [p for p in versions if 2 * sizes[p] > max(sizes.values())]
        newest = max(whole, key=_version)
        rows = _columns(newest / file)
        if best is None or len(rows["latency"]) > 2 * len(best[0]["latency"]):
            best = rows, f"AIConfigurator {operator} table of {system}, {backend} {newest.name}"
    return best


def _version(path: Path) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in path.name.split(".")]


def _columns(path: Path) -> Rows:
    from pyarrow import parquet

    unused = {"framework", "version", "device", "beam_width"}
    names = [n for n in parquet.read_schema(path).names if n not in unused]
    table = parquet.read_table(path, columns=names)
    columns = {name: table.column(name).to_numpy() for name in names}
    return {
        name: column.astype(np.float64) if np.issubdtype(column.dtype, np.number) else column
        for name, column in columns.items()
    }


def where(rows: Rows, **equal: object) -> Rows:
    """Rows with these values; columns that a table lacks do not count."""
    keep = np.ones(len(rows["latency"]), bool)
    for name, value in equal.items():
        if name in rows:  # older tables lack the columns of features they did not vary
            keep &= np.asarray(rows[name] == value)
    return {name: column[keep] for name, column in rows.items()}


@lru_cache(maxsize=64)
def expert_rows(
    system: str,
    precision: Precision,
    routing: Routing,
    *,
    fp4_units: bool,
    engine: EngineName = "vllm",
) -> tuple[Rows, str] | None:
    """Experts of one GPU in the number format that checkpoints of that precision have.

    fp8: scales a block, as the makers of mixtures publish them, else one a tensor. fp4: 8-bit or
    4-bit activations on GPUs with fp4 units, of TensorRT-LLM, whose kernels vLLM and SGLang call
    there; elsewhere 16-bit ones. Of a format timed with several kernels the one that these engines
    call: the generated one (`min_latency`, in SGLang `trtllm_moe`) where there is one. Experts
    without a gate have two matrices of three and are left out.

    Args:
        system: GPU, as the package calls it.
        precision: Of the weights.
        routing: Of the benchmark.
        fp4_units: Whether the GPU computes in fp4.
        engine: Whose kernels in fp8. On GPUs with fp4 units SGLang's table stands for TensorRT-LLM
            as well, whose generated kernels it calls; its own was timed with DeepGEMM.

    Returns:
        Columns with `width`, an expert's share of one GPU; None if none was measured.
    """
    backends: tuple[str, ...] = ("vllm", "sglang")
    kinds: tuple[tuple[str, ...], ...] = (("bfloat16",),)
    if precision == "fp8":
        kinds = (("fp8_block",), ("fp8",))
        if engine in ("sglang", "trtllm"):
            backends = ("sglang",) if fp4_units else (engine,)
    elif precision == "fp4":
        kinds = (("w4a16_mxfp4",),)
        if fp4_units:
            backends, kinds = ("trtllm",), (("w4a8_mxfp4_mxfp8", "nvfp4"),)
    read = newest_table(system, "moe", "moe_perf.parquet", backends)
    if read is None:
        return None
    some = where(read[0], distribution=_ROUTINGS[routing], moe_ep_size=1.0)
    some = _one_kernel(some)
    for kind in kinds:
        mine = np.isin(some["moe_dtype"], kind)
        if mine.any():
            rows = {name: column[mine] for name, column in some.items()}
            rows["width"] = rows["inter_size"] / np.maximum(rows["moe_tp_size"], 1.0)
            return _fastest(rows), f"{read[1]}, {' and '.join(kind)}"
    return None


def _one_kernel(rows: Rows) -> Rows:
    """Rows of gated experts, and of a format that has it those of the generated kernel alone."""
    if "kernel_source" not in rows:
        return rows
    kernel = rows["kernel_source"].astype(str)
    keep = ~np.char.endswith(kernel, "nongated")
    generated = np.char.endswith(kernel, "min_latency") | np.char.endswith(kernel, "trtllm_moe")
    for kind in np.unique(rows["moe_dtype"][generated]):
        keep &= generated | (rows["moe_dtype"] != kind)
    return {name: column[keep] for name, column in rows.items()}


def _fastest(rows: Rows) -> Rows:
    """One row a shape."""
    names = ("num_tokens", "hidden_size", "width", "num_experts", "topk")
    order = np.argsort(rows["latency"], kind="stable")
    shapes = np.stack([rows[name][order] for name in names], axis=1)
    first = order[np.sort(np.unique(shapes, axis=0, return_index=True)[1])]
    return {name: column[first] for name, column in rows.items()}
