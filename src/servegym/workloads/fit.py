"""Fitting a generator to a trace, and saying how well it fits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import FloatArray, Int32Array
from servegym.workloads.config import ArrivalConfig, GeneratedConfig
from servegym.workloads.mixtures import LengthConfig
from servegym.workloads.table import RequestTable

QUANTILES = (5, 25, 50, 75, 95, 99)
#: Of expectation maximisation.
_STEPS = 200
_MIN_CV = 0.01  # a clock's arrivals have none, a gamma process needs some


class FitRow(NamedTuple):
    """One quantity of the trace beside the fit's."""

    quantity: str
    trace: tuple[float, ...]
    fit: tuple[float, ...]
    kolmogorov: float


def fit_workload(table: RequestTable) -> GeneratedConfig:
    """Fit rate, gap variability and length mixtures; prefixes and dependences are not fitted.

    Args:
        table: The trace.

    Returns:
        A generator of independent requests.

    Raises:
        WorkloadError: If all requests arrive at one time.
    """
    if not np.isfinite(table.rate_rps):
        raise WorkloadError(
            "a rate needs requests that arrive by themselves at two times or more, got"
            f" {len(table)} request(s) from one time on"
        )
    gaps = np.diff(table.arrival_s)
    return GeneratedConfig(
        rate_rps=table.rate_rps,
        arrivals=ArrivalConfig(kind="gamma", cv=max(_MIN_CV, float(gaps.std() / gaps.mean()))),
        prompt=_mixture(table.prompt_tokens),
        output=_mixture(table.output_tokens),
    )


def _mixture(lengths: Int32Array) -> LengthConfig:
    """Fit two lognormals by expectation maximisation."""
    x = np.log(lengths.astype(np.float64))
    mean = np.quantile(x, (0.3, 0.8))
    sigma = np.full(2, x.std() + 1e-3)
    weight = np.full(2, 0.5)
    for _ in range(_STEPS):
        density = weight / sigma * np.exp(-0.5 * ((x[:, None] - mean) / sigma) ** 2) + 1e-300
        share = density / density.sum(1, keepdims=True)
        total = share.sum(0) + 1e-12
        mean = (share * x[:, None]).sum(0) / total
        sigma = np.sqrt((share * (x[:, None] - mean) ** 2).sum(0) / total) + 0.02
        weight = total / len(x)
    return LengthConfig(
        medians_tokens=tuple(np.exp(mean).round(2).tolist()),
        sigmas=tuple(sigma.round(4).tolist()),
        weights=tuple(weight.round(4).tolist()),
        min_tokens=int(lengths.min()),
        max_tokens=int(lengths.max()),
    )


def fit_quality(table: RequestTable, config: GeneratedConfig) -> list[FitRow]:
    """Compare a trace with a stream drawn from its fit.

    Args:
        table: The trace.
        config: Its fit.

    Returns:
        Quantiles and Kolmogorov distance of gaps, prompts and outputs.
    """
    drawn = config.table(np.random.default_rng(0), num_requests=len(table))
    pairs = (
        ("gap_s", np.diff(table.arrival_s), np.diff(drawn.arrival_s)),
        ("prompt_tokens", table.prompt_tokens, drawn.prompt_tokens),
        ("output_tokens", table.output_tokens, drawn.output_tokens),
    )
    return [
        FitRow(
            name,
            tuple(np.percentile(a, QUANTILES).tolist()),
            tuple(np.percentile(b, QUANTILES).tolist()),
            _kolmogorov(np.asarray(a, np.float64), np.asarray(b, np.float64)),
        )
        for name, a, b in pairs
    ]


def _kolmogorov(a: FloatArray, b: FloatArray) -> float:
    both = np.sort(np.concatenate((a, b)))
    below_a = np.searchsorted(np.sort(a), both, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), both, side="right") / len(b)
    return float(np.abs(below_a - below_b).max())
