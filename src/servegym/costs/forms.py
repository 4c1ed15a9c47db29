"""Analytic forms of operator times, and the coordinates in which measurements correct them.

All functions take and return arrays (`float64`, broadcast against each other) in SI units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from servegym.assets.specs import AllReduceFit, Correction, KernelFit
from servegym.costs.source import Precision
from servegym.typing import FloatArray

ELEMENT_BYTES = 2.0  # of activations and KV cache
#: Bytes of a weight; fp4 has a scale of one byte every 16 elements.
WEIGHT_BYTES: dict[Precision, float] = {"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625}
#: Query rows that a thread block of FlashAttention 2 computes at once on a paged KV cache
#: (`kBlockM` of its split-KV kernels).
TILE_ROWS = 64.0

_Numbers = npt.ArrayLike


@dataclass(frozen=True)
class LogTable:
    """Logarithms of measured over analytic time, multilinear in the logarithms of coordinates.

    Beyond its knots the nearest value holds, so that far away the form's own growth goes on.

    Attributes:
        axes: Knots by coordinate.
        values: `float64`, one axis a coordinate.
    """

    axes: dict[str, FloatArray]
    values: FloatArray

    @classmethod
    def of(cls, correction: Correction) -> LogTable:
        """Unpack the stored form."""
        axes = {name: np.array(knots, np.float64) for name, knots in correction.axes.items()}
        shape = [len(knots) for knots in axes.values()]
        return cls(axes, np.array(correction.percent, np.float64).reshape(shape) / 100.0)

    def __call__(self, coordinates: dict[str, FloatArray]) -> FloatArray:
        """Interpolate at points given by their coordinates."""
        total = np.zeros(())
        for index, weight in corners(self.axes, coordinates):
            total = total + weight * self.values[index]
        return np.asarray(total, np.float64)


def table_of(fit: KernelFit) -> LogTable | None:
    """Return the correction of a fit, if it has one."""
    return None if fit.correction is None else LogTable.of(fit.correction)


def corners(
    axes: dict[str, FloatArray], coordinates: dict[str, FloatArray]
) -> list[tuple[tuple[npt.NDArray[np.int64], ...], FloatArray]]:
    """Split points over the knots around them.

    Returns:
        For each of the 2^d corners: index arrays (one an axis) and weights.
    """
    found: list[tuple[tuple[npt.NDArray[np.int64], ...], FloatArray]] = [((), np.ones(()))]
    for name, knots in axes.items():
        grid = np.log(knots)
        x = np.clip(np.log(np.maximum(coordinates[name], 1e-12)), grid[0], grid[-1])
        if len(knots) == 1:
            low = np.zeros(x.shape, np.int64)
            found = [((*index, low), weight) for index, weight in found]
            continue
        low = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, len(grid) - 2)
        share = (x - grid[low]) / (grid[low + 1] - grid[low])
        found = [
            ((*index, low + step), weight * part)
            for index, weight in found
            for step, part in ((0, 1.0 - share), (1, share))
        ]
    return found


@dataclass(frozen=True)
class Operator:
    """One operator at given shapes: its work, and where these shapes lie for corrections.

    Attributes:
        flops: Of the operator.
        num_bytes: It must at least move between memory and chip.
        cold_bytes: Those of them that a real engine never finds in a cache: weights, KV.
        coordinates: By name.
        seq_heads: Decode attention: sequences times KV heads, else 0.
    """

    flops: FloatArray
    num_bytes: FloatArray
    cold_bytes: FloatArray
    coordinates: dict[str, FloatArray]
    seq_heads: FloatArray

    def form_s(self, fit: KernelFit, peak_flops: float, bytes_per_s: float) -> FloatArray:
        """Seconds by the analytic form alone, in a benchmark that repeats the operator."""
        a = self.flops / (peak_flops * fit.eff_flops)
        b = self.num_bytes / (bytes_per_s * fit.eff_bytes)
        if fit.cache_bytes:
            cached = 1.0 / (1.0 + (self.cold_bytes / fit.cache_bytes) ** 8)
            b = b * (1.0 - cached * (1.0 - 1.0 / fit.cache_speedup))
        high, low = np.maximum(a, b), np.minimum(a, b)
        ratio = np.divide(low, high, out=np.zeros(high.shape), where=high > 0)
        bent = high * (1.0 + ratio**fit.p) ** (1.0 / fit.p)
        return np.asarray(fit.c0_s + bent + fit.s_per_seq_head * self.seq_heads, np.float64)

    def measured_s(
        self, fit: KernelFit, table: LogTable | None, peak_flops: float, bytes_per_s: float
    ) -> FloatArray:
        """Seconds as a benchmark would measure them, caches warm."""
        form = self.form_s(fit, peak_flops, bytes_per_s)
        return form if table is None else form * np.exp(table(self.coordinates))

    def floor_s(self, fit: KernelFit, peak_flops: float, bytes_per_s: float) -> FloatArray:
        """Seconds that an engine cannot beat: data-sheet FLOP rate, reached bandwidth."""
        return np.maximum(self.flops / peak_flops, self.cold_bytes / (bytes_per_s * fit.eff_bytes))


def collective_s(fit: AllReduceFit, volume: float) -> float:
    """Seconds in which every GPU sends `volume` bytes: latency and bandwidth, bent."""
    volume_s = volume / fit.bus_bytes_per_s
    high, low = max(fit.alpha_s, volume_s), min(fit.alpha_s, volume_s)
    return float(high * (1.0 + (low / high) ** fit.p) ** (1.0 / fit.p)) if high > 0 else 0.0


def gemm(m: _Numbers, n: _Numbers, k: _Numbers, weight_bytes: float) -> Operator:
    """`[m, k] x [k, n]`; activations have the weights' precision, the result two bytes."""
    m, n, k = _arrays(m, n, k)
    weights = weight_bytes * n * k
    return Operator(
        flops=2.0 * m * n * k,
        num_bytes=weights + weight_bytes * m * k + ELEMENT_BYTES * m * n,
        cold_bytes=weights,
        coordinates={"m": m, "n": n, "k": k, "n*k": n * k, "n/k": n / k},
        seq_heads=np.zeros(m.shape),
    )


def prefill(
    chunk: _Numbers,
    context: _Numbers,
    heads: _Numbers,
    kv_heads: _Numbers,
    head_dim: float,
    batch: _Numbers = 1.0,
    *,
    kv_bytes: float = ELEMENT_BYTES,
) -> Operator:
    """Causal attention of `chunk` new tokens over `context` cached ones, `batch` equal requests.

    A chunk over a context has the pairs and the query tiles of a prompt of `chunk + 2 context`
    tokens with fewer heads; under that shape its correction is looked up.
    """
    c, h, heads, kv_heads, b = _arrays(chunk, context, heads, kv_heads, batch)
    pairs = b * heads * c * (h + 0.5 * (c + 1.0))
    kv = 2.0 * kv_bytes * head_dim * b * (c + h) * kv_heads
    return Operator(
        flops=4.0 * head_dim * pairs,
        num_bytes=kv + 2.0 * ELEMENT_BYTES * head_dim * b * c * heads,
        cold_bytes=kv,
        coordinates={
            "length": c + 2.0 * h,
            "heads": b * heads * c / (c + 2.0 * h),
            "group": heads / kv_heads,
        },
        seq_heads=np.zeros(c.shape),
    )


def decode(
    batch: _Numbers,
    kv_tokens: _Numbers,
    heads: _Numbers,
    kv_heads: _Numbers,
    head_dim: float,
    *,
    kv_bytes: float = ELEMENT_BYTES,
) -> Operator:
    """One new token each of `batch` sequences that attend to `kv_tokens` in all."""
    b, tokens, heads, kv_heads = _arrays(batch, kv_tokens, heads, kv_heads)
    kv = 2.0 * kv_bytes * head_dim * kv_heads * tokens
    return Operator(
        flops=np.zeros(b.shape),
        num_bytes=kv,
        cold_bytes=kv,
        coordinates={
            "kv bytes": kv,
            "sequence heads": b * kv_heads,
            "batch": b,
            "context": tokens / b,
            "group": heads / kv_heads,
        },
        seq_heads=b * kv_heads,
    )


def unpacked_decode(
    batch: _Numbers,
    kv_tokens: _Numbers,
    heads: _Numbers,
    kv_heads: _Numbers,
    head_dim: float,
    l2_bytes: float,
    num_sms: int,
) -> Operator:
    """Decodes in one kernel call with prefill chunks, as FlashAttention 2 computes them.

    Alone, decodes have the query heads of a group packed into one tile and their keys split over
    thread blocks. In a call that also holds chunks neither is done: every head of every sequence
    is a tile of `TILE_ROWS` rows of which one is used, and a thread block walks along all its
    keys, so that few of them leave multiprocessors idle. The heads of a group find each other's
    keys in the cache, if they run at the same time or all sequences' keys of one head fit in it.

    Args:
        batch: Decoding sequences.
        kv_tokens: Tokens these attend to in all.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Elements of a head.
        l2_bytes: Last cache.
        num_sms: Multiprocessors.
    """
    b, tokens, heads, kv_heads = _arrays(batch, kv_tokens, heads, kv_heads)
    group = heads / kv_heads
    one_head = 2.0 * ELEMENT_BYTES * head_dim * tokens
    at_once = np.clip(num_sms / b, 1.0, group)  # heads of a group
    missed = 1.0 / (1.0 + (l2_bytes / one_head) ** 4)
    reads = 1.0 + missed * (group / at_once - 1.0)
    idle = np.maximum(num_sms / (b * heads), 1.0)
    return Operator(
        flops=4.0 * TILE_ROWS * head_dim * heads * tokens * idle,
        num_bytes=kv_heads * one_head * reads,
        cold_bytes=kv_heads * one_head,
        coordinates={"kv bytes": kv_heads * one_head, "sequence heads": b * heads},
        seq_heads=b * heads,
    )


def empty_tiles(batch: _Numbers, longest_chunk: _Numbers, heads: _Numbers) -> FloatArray:
    """Tiles without a query that FlashAttention 2 launches for decodes beside a prefill.

    Every sequence of a call gets as many tiles as the longest chunk needs; all of a decode but one
    end at once, which is still a thread block to start.

    Args:
        batch: Decoding sequences.
        longest_chunk: Tokens.
        heads: Query heads.

    Returns:
        Number of tiles, `float64`.
    """
    b, chunk, heads = _arrays(batch, longest_chunk, heads)
    return np.asarray(b * heads * chunk / TILE_ROWS, np.float64)


def experts(
    tokens: _Numbers,
    hidden: _Numbers,
    width: _Numbers,
    num_experts: _Numbers,
    active: _Numbers,
    matrices: float,
    weight_bytes: float,
    *,
    even: bool = False,
) -> Operator:
    """Grouped experts of `width` each; `even` routing touches as many as there are rows for.

    Otherwise as many as independent uniform choices touch on average. A skewed routing touches
    fewer and waits for the fullest; what that costs is in the correction.
    """
    t, hidden, width, num, active = _arrays(tokens, hidden, width, num_experts, active)
    rows = t * active
    touched = np.minimum(num, rows) if even else num * (1.0 - (1.0 - active / num) ** t)
    weights = weight_bytes * touched * matrices * hidden * width
    return Operator(
        flops=2.0 * matrices * rows * hidden * width,
        num_bytes=weights + 2.0 * ELEMENT_BYTES * rows * (hidden + width),
        cold_bytes=np.minimum(1.0, active / num) * weight_bytes * num * matrices * hidden * width,
        coordinates={"rows": rows / num, "tokens": t, "matrix": hidden * width, "experts": num},
        seq_heads=np.zeros(t.shape),
    )


def elementwise(tokens: _Numbers, hidden: float, qk_width: float, ffn_width: float) -> Operator:
    """Two norms, rotary embedding and activation of a layer.

    A norm reads input and residual and writes both, rotary embedding reads and writes Q and K,
    the activation reads gate and up and writes their product. All were just produced, so that
    a cache may hold them in an engine as well.
    """
    (t,) = _arrays(tokens)
    moved = ELEMENT_BYTES * t * (8.0 * hidden + 2.0 * qk_width + 3.0 * ffn_width)
    zero = np.zeros(t.shape)
    return Operator(zero, moved, zero, {"bytes": moved}, zero)


def quantise(tokens: _Numbers, width: _Numbers) -> Operator:
    """Activations of `width` read in 16 bits and written in 8."""
    t, width = _arrays(tokens, width)
    moved = (ELEMENT_BYTES + 1.0) * t * width
    zero = np.zeros(t.shape)
    return Operator(zero, moved, zero, {"bytes": moved}, zero)


def _arrays(*values: _Numbers) -> tuple[FloatArray, ...]:
    return tuple(np.broadcast_arrays(*(np.asarray(v, np.float64) for v in values)))
