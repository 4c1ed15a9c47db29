"""Measured kernels of a model as a source of costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.assets.specs import GpuSpec, KernelFit, ModelSpec
from servegym.calibrate.datasheet import DataSheet
from servegym.calibrate.plan import GridSize, Kernel, KernelName, Shapes, plan, shapes_of
from servegym.costs import forms
from servegym.costs.curve import Surface
from servegym.costs.forms import Operator
from servegym.costs.measurements import Measurements, refuse_impossible
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import Evidence, Heads
from servegym.errors import ConfigError
from servegym.typing import FloatArray

#: Added to the cached tokens of a chunk, so that none of them has a logarithm too.
_CONTEXT_SHIFT = 512.0
#: How far beyond the measured sizes costs are asked for.
_MOST_TOKENS, _MOST_CONTEXT = 65536, 262144
_MOST_SEQUENCES, _MOST_KV_TOKENS = 2048, 2**24
#: The roofline at the peaks, for the growth beyond the measured sizes.
_PLAIN = KernelFit(c0_s=1e-6, eff_bytes=1.0, p=2.0)
_Curves = dict[tuple[object, ...], Surface]


class KernelTime(BaseModel):
    """What a kernel took.

    Attributes:
        operator: Which.
        shape: As in `Kernel`.
        median_s: Of the samples.
        spread: Distance of their quartiles over the median.
        samples: Their number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    operator: KernelName
    shape: tuple[int, ...]
    median_s: float = Field(gt=0)
    spread: float = Field(ge=0)
    samples: int = Field(ge=1)

    @property
    def kernel(self) -> Kernel:
        """The operator and the shape that were measured."""
        return Kernel(self.operator, self.shape)


class KernelTimes(BaseModel):
    """Micro-benchmarks of a model's operators.

    Attributes:
        grid: Ends of the grids.
        times: One a kernel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["kernels"] = "kernels"
    grid: GridSize
    times: tuple[KernelTime, ...] = ()

    def missing(self, model: ModelSpec, tp: int) -> list[Kernel]:
        """Kernels of the plan that are not measured yet."""
        done = {time.kernel for time in self.times}
        return [kernel for kernel in plan(model, tp, self.grid) if kernel not in done]

    def source(self, gpu: GpuSpec, model: ModelSpec, tp: int) -> MeasuredSource:
        """Make them a source of costs.

        Raises:
            ConfigError: If kernels are missing, foreign, or faster than the device can be.
        """
        planned = set(plan(model, tp, self.grid))
        if missing := self.missing(model, tp):
            raise ConfigError(
                f"unfinished, {len(missing)} of {len(planned)} kernels are missing: "
                "run the command that began it again"
            )
        if foreign := [time.kernel for time in self.times if time.kernel not in planned]:
            raise ConfigError(f"{foreign[0].operator} {foreign[0].shape} is none of this model's")
        shapes = shapes_of(model, tp)
        for name in ("gemm", "prefill", "decode"):
            mine = [time for time in self.times if time.operator == name]
            operator, seconds = _operator(name, mine, shapes), _seconds(mine)
            data = Measurements(operator, seconds, np.zeros(len(mine), bool), f"{name} kernels")
            refuse_impossible(data, gpu.bf16_flops, gpu.memory_bytes_per_s, gpu.l2_bytes)
        return MeasuredSource(gpu, grid=self.grid, curves=_curves(self.times, shapes, tp, gpu))


def reached_peaks(
    times: Sequence[KernelTime], model: ModelSpec, tp: int, name: str, memory_bytes: float
) -> DataSheet:
    """Describe a device that has no data sheet by the highest rates its kernels reached."""
    shapes = shapes_of(model, tp)
    flops, rates = [], []
    for operator_name in ("gemm", "prefill", "decode"):
        mine = [time for time in times if time.operator == operator_name]
        operator, seconds = _operator(operator_name, mine, shapes), _seconds(mine)
        flops.append(np.max(operator.flops / seconds))
        rates.append(np.max(operator.num_bytes / seconds))
    return DataSheet(
        name=name,
        bf16_flops=float(f"{max(flops):.3g}"),
        memory_bytes=memory_bytes,
        memory_bytes_per_s=float(f"{max(rates):.3g}"),
    )


@dataclass(frozen=True)
class MeasuredSource(RooflineSource):
    """Operator times of one model on one device, straight in logarithms between measured sizes.

    Norms, experts and the time outside kernels were not measured: they come from the fits.

    Attributes:
        grid: Ends of the measured sizes.
        curves: Seconds by operator and its fixed sizes.
    """

    grid: GridSize = field(default_factory=GridSize)
    curves: _Curves = field(default_factory=dict, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Where the numbers come from."""
        return "measured kernels"

    def gemm_s(self, m: float, n: int, k: int, weight_bytes: float) -> float:
        """Seconds of `[m, k] x [k, n]`."""
        curve = self.curves.get(("gemm", n, k))
        if curve is None:
            return RooflineSource.gemm_s(self, m, n, k, weight_bytes)
        return curve(m, 1.0)

    def prefill_attention_s(self, chunk: float, context: float, shape: Heads) -> float:
        """Seconds of causal attention of a chunk over what is cached, without the launch."""
        whole_s = self.curves[("prefill",)](chunk, context + _CONTEXT_SHIFT)
        return max(whole_s - self.attention_launch_s(), 0.0)

    def decode_attention_s(self, batch: float, kv_tokens: float, shape: Heads) -> float:
        """Seconds of one token each of `batch` sequences over `kv_tokens` in all, no launch."""
        return max(self.curves[("decode",)](batch, kv_tokens) - self.attention_launch_s(), 0.0)

    def attention_launch_s(self) -> float:
        """What the shortest attention kernel took."""
        shortest = (self.curves[(name,)].log_s[0][0] for name in ("prefill", "decode"))
        return float(np.exp(min(shortest)))

    def all_reduce_s(self, num_bytes: float, num_gpus: int) -> float:
        """Seconds of an all-reduce."""
        curve = self.curves.get(("all_reduce", num_gpus))
        if curve is None:
            return RooflineSource.all_reduce_s(self, num_bytes, num_gpus)
        return curve(num_bytes, 1.0)

    # ---- what stands behind them ----

    def gemm_evidence(self, n: int, k: int) -> Evidence:
        """Measured, if it is one of the model's."""
        if ("gemm", n, k) not in self.curves:
            return RooflineSource.gemm_evidence(self, n, k)
        note = f"own benchmark, to {self.grid.max_tokens} tokens"
        return Evidence(f"GEMM {n} x {k} bf16", "measured", note)

    def attention_evidence(self, shape: Heads) -> list[Evidence]:
        """Say to what sizes prefill, then decode, was benchmarked."""
        size = self.grid
        notes = {
            "prefill": f"chunks to {size.max_tokens} tokens over {size.max_context}",
            "decode": f"to {size.max_batch} sequences, {size.max_kv_tokens} KV tokens",
        }
        found = [
            Evidence(f"{name} attention, {shape}", "measured", f"own benchmark, {note}")
            for name, note in notes.items()
        ]
        return found + self._mixed_evidence(shape)

    def all_reduce_evidence(self, num_gpus: int) -> Evidence:
        """Measured, if there was more than one device."""
        if ("all_reduce", num_gpus) not in self.curves:
            return RooflineSource.all_reduce_evidence(self, num_gpus)
        return Evidence(f"all-reduce over {num_gpus}", "measured", "own benchmark")


def _seconds(times: Sequence[KernelTime]) -> FloatArray:
    return np.array([time.median_s for time in times], np.float64)


def _operator(name: str, times: Sequence[KernelTime], shapes: Shapes) -> Operator:
    sizes = np.array([time.shape for time in times], np.float64).T
    if name == "gemm":
        m, n, k = sizes
        return forms.gemm(m, n, k, 2.0)
    kernel = forms.prefill if name == "prefill" else forms.decode
    x, y = sizes
    return kernel(x, y, shapes.heads, shapes.kv_heads, float(shapes.head_dim))


def _curves(times: Sequence[KernelTime], shapes: Shapes, tp: int, gpu: GpuSpec) -> _Curves:
    """Curves through the measured times; beyond them these grow as the roofline does."""
    peaks = (gpu.bf16_flops, gpu.memory_bytes_per_s)
    seconds = {time.kernel: time.median_s for time in times}
    found: _Curves = {}
    for n, k in shapes.gemms:
        rows = {
            at[0]: s for (name, at), s in seconds.items() if name == "gemm" and at[1:] == (n, k)
        }
        x = _beyond(rows, _MOST_TOKENS)
        form_s = forms.gemm(x, n, k, 2.0).form_s(_PLAIN, *peaks)
        found["gemm", n, k] = _curve(x, rows, form_s)
    if tp > 1:
        rows = {at[0]: s for (name, at), s in seconds.items() if name == "all_reduce"}
        x = _beyond(rows, 2 * _MOST_TOKENS * shapes.hidden)
        found["all_reduce", tp] = _curve(x, rows, x)
    heads = (shapes.heads, shapes.kv_heads, float(shapes.head_dim))
    grid = {at: s for (name, at), s in seconds.items() if name == "prefill"}
    x, y = _axes(grid, _MOST_TOKENS, _MOST_CONTEXT)
    form_s = forms.prefill(x[:, None], y[None, :], *heads).form_s(_PLAIN, *peaks)
    found[("prefill",)] = Surface.through(x, y + _CONTEXT_SHIFT, _extended(grid, x, y, form_s))
    grid = {at: s for (name, at), s in seconds.items() if name == "decode"}
    x, y = _axes(grid, _MOST_SEQUENCES, _MOST_KV_TOKENS)
    form_s = forms.decode(x[:, None], y[None, :], *heads).form_s(_PLAIN, *peaks)
    found[("decode",)] = Surface.through(x, y, _extended(grid, x, y, form_s))
    return found


def _beyond(sizes: Iterable[int], most: int) -> FloatArray:
    """Measured sizes, and doublings of the largest up to `most`."""
    x = sorted(set(sizes))
    while 2 * x[-1] <= most:
        x.append(2 * x[-1])
    return np.array(x, np.float64)


def _axes(
    grid: dict[tuple[int, ...], float], most_x: int, most_y: int
) -> tuple[FloatArray, FloatArray]:
    return _beyond((x for x, _ in grid), most_x), _beyond((y for _, y in grid), most_y)


def _extended(
    grid: dict[tuple[int, ...], float], x: FloatArray, y: FloatArray, form_s: FloatArray
) -> FloatArray:
    """Measured times; beyond them the form times the ratio to it at the nearest measured point."""
    last = (max(a for a, _ in grid), max(b for _, b in grid))
    i, j = (int(np.flatnonzero(axis == end)[0]) for axis, end in zip((x, y), last, strict=True))
    measured = [[grid[int(a), int(b)] for b in y[: j + 1]] for a in x[: i + 1]]
    ratio = np.array(measured) / form_s[: i + 1, : j + 1]
    ratio = np.pad(ratio, ((0, len(x) - i - 1), (0, len(y) - j - 1)), mode="edge")
    return np.asarray(form_s * ratio, np.float64)


def _curve(x: FloatArray, rows: dict[int, float], form_s: FloatArray) -> Surface:
    grid: dict[tuple[int, ...], float] = {(size, 1): s for size, s in rows.items()}
    seconds = _extended(grid, x, np.ones(1), form_s[:, None])
    return Surface.through(x, np.array([1.0, 2.0]), np.repeat(seconds, 2, axis=1))
