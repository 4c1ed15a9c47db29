"""Figures of the validation page; matplotlib is needed here only."""

from __future__ import annotations

import numpy as np

from servegym.drawing import PALETTE, as_image, pyplot
from servegym.typing import FloatArray
from servegym.validate.score import RowScore, RunScore

_MEASURED, _SIMULATED = PALETTE[0], PALETTE[1]
_LABELS = {
    "running": "running requests",
    "waiting": "waiting requests",
    "kv_cache_pct": "KV use, %",
}


def cdf_figure(score: RunScore) -> str:
    """TTFT, TPOT and E2E distributions of a run, measured and simulated on top of each other."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    for axis, (name, factor, label) in zip(
        axes,
        (("ttft_s", 1.0, "TTFT, s"), ("tpot_s", 1e3, "TPOT, ms"), ("e2e_s", 1.0, "E2E, s")),
        strict=True,
    ):
        for values, color, legend in (
            (getattr(score.run, name), _MEASURED, "measured"),
            (getattr(score.replay, name), _SIMULATED, "simulated"),
        ):
            x = np.sort(factor * values[~np.isnan(values)])
            axis.plot(x, np.arange(1, len(x) + 1) / len(x), color=color, label=legend)
        axis.set(xlabel=label, ylabel="share of requests")
    axes[0].set_xscale("log")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return as_image(figure, f"Cumulative distributions of {score.run.name}")


def series_figure(score: RunScore) -> str:
    """Running and waiting requests and KV use over time, measured and simulated."""
    names = [name for name in _LABELS if name in score.series]
    if not names:
        return ""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(names), figsize=(13, 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        time_s = score.run.series["t"]
        if name in score.run.series and score.run.series[name].any():
            axis.plot(time_s, score.run.series[name], color=_MEASURED, label="measured")
        axis.plot(time_s, score.series[name], color=_SIMULATED, label="simulated")
        axis.set(xlabel="s", ylabel=_LABELS[name])
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    return as_image(figure, f"Requests and KV use over time of {score.run.name}")


def scatter_figure(rows: list[RowScore]) -> str:
    """Simulated over measured, one point a row and one colour an engine family."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    families = sorted({score.plan.family for score in rows})
    for axis, (name, factor, label) in zip(
        axes,
        (
            ("tpot_s", 1e3, "TPOT, ms"),
            ("ttft_s", 1e3, "TTFT, ms"),
            ("output_tokens_per_s", 1.0, "output tokens/s"),
        ),
        strict=True,
    ):
        for i, family in enumerate(families):
            points: FloatArray = np.array(
                [
                    (factor * score.figures[name].measured, factor * score.figures[name].simulated)
                    for score in rows
                    if score.plan.family == family and name in score.figures
                ]
            ).reshape(-1, 2)
            if len(points):
                color = PALETTE[i % len(PALETTE)]
                axis.plot(*points.T, ".", markersize=3, alpha=0.6, color=color, label=family)
        values = [
            factor * value
            for score in rows
            if name in score.figures
            for value in score.figures[name]
            if value > 0
        ]
        if values:
            ends = [min(values), max(values)]
            axis.plot(ends, ends, color="gray", linewidth=1)
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=7)
        axis.set(xlabel=f"measured {label}", ylabel="simulated")
    figure.tight_layout()
    return as_image(figure, "Simulated over measured figures of all rows")


def error_figure(rows: list[RowScore]) -> str:
    """Cumulative distributions of the absolute error of the main figure, by engine family."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for i, family in enumerate(sorted({score.plan.family for score in rows})):
        errors = np.sort([abs(s.main.error) for s in rows if s.plan.family == family])
        share = np.arange(1, len(errors) + 1) / len(errors)
        axis.plot(100 * errors, share, color=PALETTE[i % len(PALETTE)], label=family)
    axis.set(xlim=(0, 100), xlabel="absolute error, %", ylabel="share of rows")
    axis.legend(fontsize=8)
    return as_image(figure, "Distribution of absolute errors by engine family")
