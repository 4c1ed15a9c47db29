"""The measured source: operator latencies in the tables of the package aiconfigurator-core.

Each table becomes a correction of the roofline with a knot at every measured size: at a measured
shape it gives the measured time, between shapes it interpolates the ratio to the roofline.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from servegym.assets.specs import GpuSpec, KernelFit
from servegym.costs import forms
from servegym.costs.forms import WEIGHT_BYTES, LogTable, Operator
from servegym.costs.measurements import Measurements, refuse_impossible
from servegym.costs.package import Rows, expert_rows, newest_table, tables_installed, where
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import Evidence, Experts, Heads, Precision, Routing
from servegym.errors import ConfigError, unknown_name
from servegym.typing import FloatArray

#: Error where every second size along one axis was left out, all GPUs: `scripts/table-errors`.
_BETWEEN_SIZES = (3.7, 22.3)
_GEMM_TYPES = {"bf16": "bfloat16", "fp8": "fp8", "fp4": "nvfp4"}


@dataclass(frozen=True)
class TableSource(RooflineSource):
    """Operator times of a GPU from measured tables; what they lack comes from the fits.

    Raises:
        ConfigError: If the package is missing, has no tables of the GPU, or holds times that the
            GPU cannot reach.
    """

    def __post_init__(self) -> None:
        if not tables_installed():
            raise ConfigError(
                "measured tables need the package aiconfigurator-core: pip install "
                "'aiconfigurator-core>=0.12,<0.13', or use --source fits"
            )
        if not self.gpu.aic_system:
            raise ConfigError("there are no measured tables of this GPU: use --source fits")

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return "measured tables"

    @property
    def _gemms(self) -> _Family | None:
        """The table of its GEMMs; those on quantised operands are differences, and fitted."""
        if self.scales == "static" and self.gemm_precision != "bf16":
            return None
        block = self.scales == "block" and self.gemm_precision == "fp8"
        return _gemm_table(_Device.of(self.gpu), self.gemm_precision, block)

    def _gemm_fit(self, n: float, k: float) -> tuple[KernelFit, LogTable | None]:
        table = self._gemms
        if table is None:
            return RooflineSource._gemm_fit(self, n, k)
        return _plain(table.source), table.log_table

    def _prefill_fit(self, shape: Heads) -> tuple[KernelFit, LogTable | None]:
        found = self._attention("prefill", shape)
        if found is None:
            return RooflineSource._prefill_fit(self, shape)
        return _plain(found.source), found.log_table

    def _decode_fit(self, shape: Heads) -> tuple[KernelFit, LogTable | None]:
        found = self._attention("decode", shape)
        if found is None:
            return RooflineSource._decode_fit(self, shape)
        return _plain(found.source), found.log_table

    def _attention(self, name: str, shape: Heads) -> _Family | None:
        kv = "fp8" if self.fp8_kv else "bfloat16"
        return _attention_table(_Device.of(self.gpu), name, kv, shape)

    def _experts(self, shape: Experts) -> _Family | None:
        return _experts_table(_Device.of(self.gpu), self.precision, shape.routing, shape.sizes)

    def _experts_fit(self, shape: Experts) -> tuple[KernelFit, LogTable | None] | None:
        found = self._experts(shape)
        if found is None:
            return RooflineSource._experts_fit(self, shape)
        return _plain(found.source), found.log_table

    # ---- what stands behind them ----

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """Measured, between measured matrices, or beyond them."""
        table = self._gemms
        if table is None:
            return RooflineSource.gemm_evidence(self, n, k)
        operator = f"GEMM {n} x {k} {self.gemm_precision}"
        axes = table.log_table.axes
        if (n, k) in table.matrices:
            return Evidence(operator, "measured", table.source, _BETWEEN_SIZES)
        if axes["n"][0] <= n <= axes["n"][-1] and axes["k"][0] <= k <= axes["k"][-1]:
            near = [axis[np.argmin(np.abs(np.log(axis / x)))] for axis, x in _pairs(axes, n, k)]
            note = f"between measured matrices, nearest {near[0]:.0f} x {near[1]:.0f}"
            return Evidence(operator, "interpolated", note, _BETWEEN_SIZES)
        note = "larger or smaller than every measured matrix"
        return Evidence(operator, "extrapolated", note, _BETWEEN_SIZES)

    def experts_evidence(self, shape: Experts) -> Evidence:
        """Measured, or scaled from the nearest measured mixture."""
        found = self._experts(shape)
        if found is None:
            return RooflineSource.experts_evidence(self, shape)
        operator = f"{shape} {self.precision}, {shape.routing} routing"
        return _family_evidence(operator, found, shape.sizes)

    def attention_evidence(self, shape: Heads) -> list[Evidence]:
        """Measured, or scaled from the nearest heads measured: prefill, then decode."""
        evidence = RooflineSource.attention_evidence(self, shape)
        for i, name in enumerate(("prefill", "decode")):
            found = self._attention(name, shape)
            if found is not None:
                evidence[i] = _family_evidence(evidence[i].operator, found, shape)
        return evidence


class _Device(NamedTuple):
    """What tables are read and judged by; hashable, unlike `GpuSpec`."""

    system: str
    flops: tuple[float, float, float]  # bf16, fp8, fp4
    bytes_per_s: float
    cache_bytes: float
    engine: str

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends of the package whose kernels stand for the engine's, best first."""
        others = ("vllm", "sglang")
        return others if self.engine == "vllm" else (self.engine, *others)

    @classmethod
    def of(cls, gpu: GpuSpec) -> _Device:
        """Pick them from a specification."""
        flops = (gpu.bf16_flops, gpu.fp8_flops, gpu.fp4_flops)
        return cls(gpu.aic_system, flops, gpu.memory_bytes_per_s, gpu.l2_bytes, gpu.engine)

    def peak(self, precision: Precision) -> float:
        """FLOP/s; fp4 weights are computed with in bf16 where there are no fp4 units."""
        return self.flops[("bf16", "fp8", "fp4").index(precision)] or self.flops[0]


@dataclass(frozen=True)
class _Family:
    """A table of one shape family.

    Attributes:
        log_table: Ratio to the roofline.
        shape: Of the family.
        source: Backend and version.
        matrices: `(n, k)` measured, for GEMMs.
    """

    log_table: LogTable
    shape: tuple[int, ...]
    source: str
    matrices: frozenset[tuple[float, float]] = frozenset()


def _plain(source: str) -> KernelFit:
    # a launch of 1 us keeps ratios of tiny shapes in bounds; the ratios restore what was measured
    return KernelFit(c0_s=1e-6, eff_bytes=1.0, p=2.0, source=source)


def _family_evidence(operator: str, found: _Family, wanted: tuple[int, ...]) -> Evidence:
    if found.shape == wanted:
        return Evidence(operator, "measured", found.source, _BETWEEN_SIZES)
    near = " x ".join(str(size) for size in found.shape)
    note = f"ratio to the roofline of the nearest, {near}"
    return Evidence(operator, "interpolated", note, _BETWEEN_SIZES)


def _pairs(axes: dict[str, FloatArray], n: int, k: int) -> list[tuple[FloatArray, int]]:
    return [(axes["n"], n), (axes["k"], k)]


# ---- tables of one family ----


@lru_cache(maxsize=32)
def _gemm_table(gpu: _Device, precision: Precision, block: bool) -> _Family | None:
    backends = gpu.backends
    if block and backends[0] == "vllm":
        backends = backends[1:]  # its own was timed without CUDA graphs
    read = newest_table(gpu.system, "gemm", "gemm_perf.parquet", backends)
    if read is None:
        return None
    rows = where(read[0], gemm_dtype="fp8_block" if block else _GEMM_TYPES[precision])
    if not len(rows["latency"]):
        return None
    operator = forms.gemm(rows["m"], rows["n"], rows["k"], WEIGHT_BYTES[precision])
    axes = ("m", "n", "k")
    log_table = _log_table(operator, rows, axes, gpu, gpu.peak(precision), read[1])
    matrices = frozenset(zip(rows["n"].tolist(), rows["k"].tolist(), strict=True))
    return _Family(log_table, (), read[1], matrices)


@lru_cache(maxsize=256)
def _attention_table(gpu: _Device, name: str, kv: str, wanted: Heads) -> _Family | None:
    heads, kv_heads, head_dim = wanted
    file = {"prefill": "context", "decode": "generation"}[name] + "_attention_perf.parquet"
    read = newest_table(gpu.system, "attention", file, gpu.backends)
    if read is None:
        return None
    rows = where(read[0], kv_cache_dtype=kv, window_size=0.0, head_dim=float(head_dim))
    if name == "prefill":  # TensorRT-LLM prefills over an 8-bit cache in fp8
        low = kv == "fp8" and gpu.engine == "trtllm"
        rows = where(rows, attn_dtype="fp8" if low else "bfloat16")
    if not len(rows["latency"]):
        return None
    shape = _nearest(rows, ("num_heads", "num_key_value_heads"), (heads, kv_heads))
    h, k = shape
    rows = where(rows, num_heads=float(h), num_key_value_heads=float(k))
    size, kv_bytes = rows["batch_size"], 1.0 if kv == "fp8" else 2.0
    if name == "prefill":
        operator = forms.prefill(rows["isl"], 0.0, h, k, float(head_dim), size, kv_bytes=kv_bytes)
        axes: tuple[str, ...] = ("length", "heads")
    else:
        tokens = size * (rows["step"] + 1)
        operator = forms.decode(size, tokens, h, k, float(head_dim), kv_bytes=kv_bytes)
        axes = ("batch", "context")
    log_table = _log_table(operator, rows, axes, gpu, gpu.peak("bf16"), read[1])
    return _Family(log_table, (h, k, head_dim), read[1])


@lru_cache(maxsize=256)
def _experts_table(
    gpu: _Device, precision: Precision, routing: Routing, shape: tuple[int, int, int, int]
) -> _Family | None:
    read = expert_rows(gpu.system, precision, routing, fp4_units=gpu.flops[2] > 0)
    if read is None:
        return None
    rows = read[0]
    names = ("hidden_size", "width", "num_experts", "topk")
    found = _nearest(rows, names, shape)
    rows = where(rows, **{n: float(x) for n, x in zip(names, found, strict=True)})
    hidden, width, num, active = found
    operator = forms.experts(
        rows["num_tokens"], hidden, width, num, active, 3.0, WEIGHT_BYTES[precision]
    )
    log_table = _log_table(operator, rows, ("tokens",), gpu, gpu.peak(precision), read[1])
    return _Family(log_table, tuple(int(x) for x in found), read[1])


def _nearest(rows: Rows, names: tuple[str, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    families = np.unique(np.stack([rows[name] for name in names], axis=1), axis=0)
    distance = np.abs(np.log(families / np.array(wanted, np.float64))).sum(axis=1)
    return tuple(int(x) for x in families[np.argmin(distance)])


def _log_table(
    operator: Operator,
    rows: Rows,
    axes: tuple[str, ...],
    gpu: _Device,
    peak_flops: float,
    source: str,
) -> LogTable:
    """Put the ratios on their grid; where a size was not measured the nearest one's holds."""
    seconds = 1e-3 * rows["latency"]
    data = Measurements(operator, seconds, np.zeros(len(seconds), bool), source)
    refuse_impossible(data, peak_flops, gpu.bytes_per_s, gpu.cache_bytes)
    form = operator.form_s(_plain(source), peak_flops, gpu.bytes_per_s)
    knots, index = {}, []
    for name in axes:
        values, where = np.unique(operator.coordinates[name], return_inverse=True)
        knots[name] = values
        index.append(where)
    shape = tuple(len(values) for values in knots.values())
    flat = np.ravel_multi_index(index, shape)
    count = np.bincount(flat, minlength=int(np.prod(shape)))
    total = np.bincount(flat, np.log(seconds / form), minlength=int(np.prod(shape)))
    ratio = np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(shape)
    for axis in reversed(range(ratio.ndim)):
        ratio = np.moveaxis(_fill(np.moveaxis(ratio, axis, -1)), -1, axis)
    return LogTable(knots, np.nan_to_num(ratio))


def _fill(values: FloatArray) -> FloatArray:
    """Carry the last known value forward along the last axis, then the first one back."""
    for _ in range(2):
        known = np.where(np.isnan(values), -1, np.arange(values.shape[-1]))
        last = np.maximum.accumulate(known, axis=-1)
        carried = np.take_along_axis(values, np.maximum(last, 0), axis=-1)
        values = np.where(last >= 0, carried, values)[..., ::-1]
    return values


def source_of(
    gpu: GpuSpec, kind: str, *, fp8: bool = False, fp4: bool = False
) -> tuple[RooflineSource, str]:
    """Choose a source by name; fits stand in where there are no tables.

    Args:
        gpu: The GPU.
        kind: `"fits"` or `"tables"`.
        fp8: Weights and GEMMs in fp8.
        fp4: Weights in fp4.

    Returns:
        The source, and a note if it is not the one asked for.

    Raises:
        ConfigError: If there is no such kind, or the tables are physically impossible.
    """
    if kind not in ("fits", "tables"):
        raise ConfigError(unknown_name("cost source", kind, ("fits", "tables")))
    fits = RooflineSource(gpu, fp8, fp4=fp4)
    if kind == "fits":
        return fits, ""
    if not gpu.aic_system:
        return fits, "There are no measured tables of this GPU: the fits stand in."
    if not tables_installed():
        return fits, (
            "The package aiconfigurator-core with the measured tables is not installed "
            "(pip install 'aiconfigurator-core>=0.12,<0.13'): the fits stand in."
        )
    return TableSource(gpu, fp8, fp4=fp4), ""
