"""Fit the coefficients of an operator to measurements, and state the error on the rest."""

from __future__ import annotations

from typing import Literal

import numpy as np

from servegym.assets.specs import AllReduceFit, Correction, GpuSpec, KernelFit
from servegym.costs.forms import collective_s, corners, table_of
from servegym.costs.measurements import Measurements, error, refuse_impossible
from servegym.typing import BoolArray, FloatArray

Kind = Literal["gemm", "prefill", "decode", "experts", "elementwise"]

_POWERS = tuple(float(2**i) for i in range(32))
#: Coordinates and knots of the correction of each operator.
AXES: dict[Kind, dict[str, tuple[float, ...]]] = {
    "gemm": {
        "m": (1, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 4096, 16384, 131072),
        "n*k": tuple(
            2.0**i
            for i in (10, 14, 17, 19, 20, 21, 21.5, 22, 22.5, 23, 23.5, 24, 24.5, 25, 26, 28, 32)
        ),
        "n/k": tuple(2.0**i for i in (-11, -5, -3, -1, 0, 1, 3, 5, 11)),
    },
    "prefill": {
        "length": (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
        "heads": _POWERS[:15],
        "group": (1, 2, 8, 64),
    },
    "decode": {
        "context": tuple(2.0**i for i in (1, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17)),
        "sequence heads": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192),
        "batch": (1, 4, 16, 64, 256),
        "group": (1, 2),  # without groups another kernel path is taken
    },
    "experts": {
        "rows": tuple(2.0**i for i in (-9, -6, -4, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 10, 13)),
        "matrix": tuple(2.0**i for i in (16, 19, 21, 22, 23, 24, 28)),
        "experts": (8, 32, 128, 512),
    },
    "elementwise": {"bytes": tuple(2.0**i for i in range(18, 31))},
}
_SMOOTHNESS = 0.01
_SMALL_RESIDUAL = 0.03


def held_out_error(
    fit: KernelFit, data: Measurements, peak_flops: float, bytes_per_s: float
) -> tuple[float, float]:
    """Error of a fit on what it has not seen, as measured (caches warm)."""
    predicted = data.operator.measured_s(fit, table_of(fit), peak_flops, bytes_per_s)
    return error(predicted[data.held_out], data.seconds[data.held_out])


def fit_operator(
    kind: Kind,
    data: Measurements,
    gpu: GpuSpec,
    peak_flops: float,
    axes: dict[str, tuple[float, ...]] | None = None,
) -> KernelFit:
    """Fit form and correction to the half that is not held out.

    The form's coefficients are what the best tenth of the measurements reach where one term
    dominates; the correction is a smoothed least-absolute-deviation fit of the rest.

    Args:
        kind: Operator.
        data: Measurements.
        gpu: Its peaks and cache size.
        peak_flops: Of the precision.
        axes: Coordinates and knots of the correction, instead of `AXES`.

    Raises:
        ConfigError: If the measurements are faster than the data sheet allows.
    """
    seen = ~data.held_out
    refuse_impossible(data, peak_flops, gpu.memory_bytes_per_s, gpu.l2_bytes)
    form = _form(kind, data, seen, gpu, peak_flops)
    at = (peak_flops, gpu.memory_bytes_per_s)
    residual = np.log(data.seconds / data.operator.form_s(form, *at))
    knots = {name: np.array(k, np.float64) for name, k in (axes or AXES[kind]).items()}
    coordinates = {name: data.operator.coordinates[name][seen] for name in knots}
    values = _smooth_table(knots, coordinates, residual[seen])
    percent = np.round(100.0 * values).astype(int)
    correction = Correction(
        axes={name: tuple(float(f"{x:.6g}") for x in k) for name, k in knots.items()},
        percent=tuple(percent.ravel().tolist()),
    )
    fit = form.model_copy(update={"correction": correction, "source": data.source})
    return fit.model_copy(
        update={
            "error": held_out_error(fit, data, *at),
            "form_error": held_out_error(form, data, *at),
            "num_held_out": int(data.held_out.sum()),
        }
    )


def fit_mixed(
    data: Measurements, chunk_s: FloatArray, tiles: FloatArray, gpu: GpuSpec
) -> KernelFit:
    """Fit decodes beside prefill chunks, see `forms.unpacked_decode`; four coefficients.

    Args:
        data: Decodes as the operator, seconds of whole calls.
        chunk_s: Seconds of the chunk of each call alone, `float64[N]`.
        tiles: `forms.empty_tiles` of each call, `float64[N]`.
        gpu: Its peaks.
    """
    seen = ~data.held_out
    empty_s = _empty_tile_s(data, chunk_s, tiles)
    beside_s = chunk_s + empty_s * tiles
    at = (gpu.bf16_flops, gpu.memory_bytes_per_s)

    def off(fit: KernelFit) -> float:
        whole_s = beside_s + data.operator.form_s(fit, *at)
        return float(np.mean(np.abs(np.log(whole_s / data.seconds))[seen]))

    tried = [
        # the two roofs are those of one loop: the slower decides
        KernelFit(c0_s=0.0, eff_flops=flops, eff_bytes=share, s_per_seq_head=launch, p=8.0)
        for flops in np.round(np.arange(0.3, 1.0, 0.02), 2).tolist()
        for share in (0.8, 0.85, 0.9, 0.95)
        for launch in (0.0, 5e-9, 1e-8, 1.5e-8, 2e-8, 2.5e-8, 3e-8, 4e-8, 5e-8)
    ]
    best = min(tried, key=off)
    whole_s = beside_s + data.operator.form_s(best, *at)
    return best.model_copy(
        update={
            "s_per_empty_tile": empty_s,
            "source": data.source,
            "error": error(whole_s[data.held_out], data.seconds[data.held_out]),
            "num_held_out": int(data.held_out.sum()),
        }
    )


def _empty_tile_s(data: Measurements, chunk_s: FloatArray, tiles: FloatArray) -> float:
    """Seconds of an empty tile: what the same decodes cost more beside more of them.

    Calls with the same decodes are compared with the one of the fewest tiles among them; where
    there are fewer than some 10,000 tiles more, the difference is noise.
    """
    decodes = [data.operator.coordinates[name] for name in ("kv bytes", "sequence heads")]
    group = np.unique(np.stack(decodes, axis=1), axis=0, return_inverse=True)[1].ravel()
    beyond_s = data.seconds - chunk_s
    slopes = []
    for g in np.unique(group[~data.held_out]):
        mine = np.flatnonzero(group == g)
        least = mine[tiles[mine] == tiles[mine].min()]
        more = mine[tiles[mine] > tiles[least[0]] + 1e4]
        added = tiles[more] - tiles[least[0]]
        slopes.extend((beyond_s[more] - np.median(beyond_s[least])) / added)
    return float(f"{np.median(slopes):.3g}")


def fit_collective(volume: FloatArray, seconds: FloatArray) -> AllReduceFit:
    """Fit latency, bandwidth and bend of a collective by its relative error.

    Args:
        volume: Bytes that every GPU sends, `float64[N]`.
        seconds: `float64[N]`.
    """
    least, largest = float(np.percentile(seconds, 5)), volume >= 0.1 * volume.max()
    bandwidth = float(np.median((volume / seconds)[largest]))

    def off(fit: AllReduceFit) -> float:
        predicted = np.array([collective_s(fit, v) for v in volume])
        return float(np.mean(np.abs(np.log(predicted / seconds))))

    tried = [
        AllReduceFit(alpha_s=float(f"{a * least:.3g}"), bus_bytes_per_s=float(f"{b:.3g}"), p=p)
        for a in np.arange(0.7, 1.5, 0.05)
        for b in bandwidth * np.arange(0.9, 1.6, 0.05)
        for p in np.round(np.arange(0.4, 1.6, 0.05), 2).tolist()
    ]
    return min(tried, key=off)


def _form(
    kind: Kind, data: Measurements, seen: BoolArray, gpu: GpuSpec, peak_flops: float
) -> KernelFit:
    op, t = data.operator, data.seconds
    compute_s = op.flops / peak_flops
    memory_s = op.num_bytes / gpu.memory_bytes_per_s
    uncached = seen & (op.cold_bytes > 2.0 * gpu.l2_bytes) & (memory_s > 2.0 * compute_s)
    work_s = np.maximum(compute_s, memory_s)[seen]
    least = float(np.percentile(t[seen], 1))
    if kind == "gemm" and np.percentile(work_s, 1) > 0.3 * least:
        # no shape is so small that its launch is all: what the shortest take beyond their work
        short = t[seen] <= np.percentile(t[seen], 10)
        least = max(float(np.percentile((t[seen] - work_s)[short], 10)), 1e-6)
    busy = seen & (compute_s > 2.0 * memory_s) & (compute_s > 1e-4)
    s_per_seq_head = 0.0
    if kind == "decode":
        short = seen & (memory_s < 0.1 * t) & (op.seq_heads >= 256)
        if short.sum() > 10:
            s_per_seq_head = float(np.median((t[short] - least) / op.seq_heads[short]))
    form = KernelFit(
        c0_s=float(f"{least:.3g}"),
        eff_bytes=_best(memory_s[uncached] / t[uncached], 0.8),
        eff_flops=_best(compute_s[busy] / t[busy], 0.7 if kind != "decode" else 1.0),
        p=2.0 if kind in ("gemm", "experts") else 1.0,
        s_per_seq_head=float(f"{max(s_per_seq_head, 0.0):.3g}"),
    )
    return _with_cache(form, data, seen, gpu, peak_flops) if kind in ("gemm", "decode") else form


def _with_cache(
    form: KernelFit, data: Measurements, seen: BoolArray, gpu: GpuSpec, peak_flops: float
) -> KernelFit:
    """Choose size and speed of the cache with the least mean error; none if that is no gain."""

    def off(fit: KernelFit) -> float:
        seconds = data.operator.form_s(fit, peak_flops, gpu.memory_bytes_per_s)
        return float(np.mean(np.abs(np.log(seconds / data.seconds))[seen]))

    tried = [
        form.model_copy(update={"cache_bytes": share * gpu.l2_bytes, "cache_speedup": speedup})
        for share in (0.12, 0.17, 0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3)
        for speedup in (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
    ]
    best = min(tried, key=off)
    return best if gpu.l2_bytes and off(best) < 0.98 * off(form) else form


def _best(share: FloatArray, otherwise: float) -> float:
    """What the best tenth reaches of the data sheet, at most all of it."""
    return round(min(float(np.percentile(share, 90)), 1.0), 3) if len(share) > 10 else otherwise


def _smooth_table(
    axes: dict[str, FloatArray], coordinates: dict[str, FloatArray], y: FloatArray
) -> FloatArray:
    """Least absolute deviations with a penalty on bends, by reweighted least squares."""
    shape = tuple(len(knots) for knots in axes.values())
    size = int(np.prod(shape))
    pairs = [
        (np.broadcast_to(np.ravel_multi_index(index, shape), y.shape), weight)
        for index, weight in corners(axes, coordinates)
    ]
    stiff = 1e-3 * np.eye(size) + _SMOOTHNESS * _bends(axes)
    weight = np.ones(len(y))
    values: FloatArray = np.zeros(size)
    rows = np.concatenate([a * size + b for a, _ in pairs for b, _ in pairs])
    products = [u * v for _, u in pairs for _, v in pairs]
    for _ in range(6):
        matrix = np.bincount(
            rows, np.concatenate([weight * p for p in products]), minlength=size * size
        ).reshape(size, size)
        right = np.zeros(size)
        for index, share in pairs:
            right += np.bincount(index, share * weight * y, minlength=size)
        values = np.asarray(np.linalg.solve(matrix + stiff, right), np.float64)
        predicted = sum(share * values[index] for index, share in pairs)
        weight = _SMALL_RESIDUAL / np.maximum(np.abs(y - predicted), _SMALL_RESIDUAL)
    return values.reshape(shape)


def _bends(axes: dict[str, FloatArray]) -> FloatArray:
    """Squared second differences along every axis, as one quadratic form."""
    shape = [len(knots) for knots in axes.values()]
    total = np.zeros((int(np.prod(shape)),) * 2)
    for axis, knots in enumerate(axes.values()):
        if len(knots) < 3:
            continue
        step = np.diff(np.log(knots))
        bend = np.zeros((len(knots) - 2, len(knots)))
        for i in range(len(knots) - 2):
            bend[i, i : i + 3] = (1 / step[i], -1 / step[i] - 1 / step[i + 1], 1 / step[i + 1])
        square = step.mean() * bend.T @ bend
        before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
        total += np.kron(np.kron(np.eye(before), square), np.eye(after))
    return total
