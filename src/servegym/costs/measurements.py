"""Measured times of one operator: whether they are possible, and how far off predictions are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from servegym.costs.forms import Operator
from servegym.errors import ConfigError
from servegym.typing import BoolArray, FloatArray


@dataclass(frozen=True)
class Measurements:
    """Times of one operator on one GPU.

    Attributes:
        operator: Its shapes.
        seconds: Measured, `float64[N]`.
        held_out: What no fit may see, `bool[N]`.
        source: Of the measurements.
    """

    operator: Operator
    seconds: FloatArray
    held_out: BoolArray
    source: str


def error(predicted_s: FloatArray, measured_s: FloatArray) -> tuple[float, float]:
    """Median and 95th percentile of the relative error in percent."""
    off = 100.0 * np.abs(predicted_s / measured_s - 1.0)
    return round(float(np.median(off)), 1), round(float(np.percentile(off, 95)), 1)


def refuse_impossible(
    data: Measurements, peak_flops: float, bytes_per_s: float, cache_bytes: float
) -> None:
    """Refuse a table that is faster than the data sheet where no cache can explain it.

    Raises:
        ConfigError: If more than 1 % of the times beat the FLOP rate by over 10 %, or the
            bandwidth on over twice the last cache.
    """
    compute = data.operator.flops / peak_flops
    uncached = data.operator.cold_bytes > 2.0 * cache_bytes
    memory = np.where(uncached, data.operator.cold_bytes / bytes_per_s, 0.0)
    impossible = data.seconds < np.maximum(compute, memory) / 1.1
    if impossible.mean() > 0.01:
        worst = np.max(np.maximum(compute, memory) / data.seconds)
        raise ConfigError(
            f"{data.source}: {impossible.mean():.0%} of the times are faster than the data sheet "
            f"allows, up to {worst:.1f} times; check the units and the GPU's peaks"
        )
