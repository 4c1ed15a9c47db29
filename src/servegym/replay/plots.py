"""Figures of the replay page; matplotlib is needed here only."""

from __future__ import annotations

import numpy as np

from servegym.drawing import PALETTE, as_image, pyplot
from servegym.replay.drift import ReplicaDrift
from servegym.replay.result import Replayed

_LATENCIES = (
    ("ttft_s", 1.0, "TTFT, s"),
    ("tpot_s", 1e3, "TPOT, ms"),
    ("e2e_s", 1.0, "E2E, s"),
)


def cdf_figure(result: Replayed, replica: int | None = None) -> str:
    """Distributions of TTFT, TPOT and E2E: observed, predicted, and predicted as corrected.

    Args:
        result: The replay.
        replica: Only its requests; left out: all.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    rows = np.ones(len(result.forced), np.bool_)
    if replica is not None:
        rows = result.forced.actions == replica
    for axis, (name, factor, label) in zip(axes, _LATENCIES, strict=True):
        for latencies, color, line, legend in (
            (result.observed, PALETTE[0], "-", "observed"),
            (result.predicted, PALETTE[1], "-", "simulated"),
            (result.corrected, PALETTE[2], "--", "simulated, refitted"),
        ):
            values = getattr(latencies, name)[rows]
            x = np.sort(factor * values[np.isfinite(values)])
            share = np.arange(1, len(x) + 1) / max(1, len(x))
            axis.plot(x, share, color=color, linestyle=line, label=legend)
        axis.set(xlabel=label, ylabel="share of requests", xscale="log")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    where = "all requests" if replica is None else result.log.fleet.names[replica]
    return as_image(figure, f"Cumulative distributions of latencies of {where}")


def drift_figure(drift: ReplicaDrift) -> str:
    """Factors on decode and prefill over time, with intervals and what was concluded."""
    windows = drift.windows
    if windows is None:
        return ""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 2.8), sharex=True)
    for axis, i, name in zip(axes, (0, 1), ("decode", "prefill"), strict=True):
        there = windows.num_requests > 0
        axis.errorbar(
            windows.middle_s[there],
            windows.values[there, i],
            yerr=(
                (windows.values - windows.low)[there, i],
                (windows.high - windows.values)[there, i],
            ),
            fmt="o",
            markersize=3,
            color=PALETTE[0],
            label="windows",
        )
        for stretch in drift.stretches:
            effect = stretch.decode if name == "decode" else stretch.prefill
            span = [stretch.begin_s, stretch.end_s]
            color = PALETTE[1] if effect.drifted else PALETTE[2]
            axis.plot(span, [effect.value] * 2, color=color, linewidth=2)
            axis.fill_between(span, effect.low, effect.high, color=color, alpha=0.2)
        axis.axhline(1.0, color="gray", linewidth=1)
        axis.set(xlabel="s", ylabel=f"{name}, times the model")
    figure.suptitle(drift.name)
    figure.tight_layout()
    return as_image(figure, f"Factors on decode and prefill of {drift.name} over time")
