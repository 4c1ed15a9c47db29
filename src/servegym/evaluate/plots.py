"""Figures of the report; matplotlib is needed here only."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np

from servegym.cluster.outcome import latencies
from servegym.errors import ConfigError
from servegym.evaluate.harness import Evaluation
from servegym.whole_files import write_whole

#: Okabe-Ito: distinguishable with every kind of colour vision.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#000000",
)
_LINES = ("-", "--", ":")


def pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to memory."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("a report needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.facecolor": "white",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 10,
            "legend.frameon": False,
        }
    )
    return plt


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format of the file's ending, whole or not at all.

    Raises:
        OutputError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.removeprefix("."), dpi=110)
    pyplot().close(figure)
    write_whole({path: buffer.getvalue()})


def as_image(figure: Any, alt: str) -> str:
    """Return a figure as an HTML image with its data inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alt}" src="data:image/png;base64,{data}">'


def line_style(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line; with three times as many as colours they repeat."""
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": _LINES[i // len(PALETTE) % 3]}


def shown_policies(result: Evaluation, load: float, limit: int = 8) -> list[str]:
    """The learned policies, the best rules and the worst one: what plots have room for."""
    order = sorted(
        (n for n, _ in result.policies), key=lambda n: result.mean(n, load, "e2e_mean_s")
    )
    keep = [*result.learned, *order]
    unique = list(dict.fromkeys(keep))
    return [*unique[: limit - 1], order[-1]] if len(unique) > limit else unique


def cdf_figure(result: Evaluation, load: float) -> str:
    """Latency distributions of the first held-out episode."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for i, name in enumerate(shown_policies(result, load)):
        ttft, _, e2e = latencies(result.trails[name, load].outcomes)
        for axis, values in zip(axes, (ttft, e2e), strict=True):
            x = np.sort(values[~np.isnan(values)])
            axis.plot(x, np.arange(1, len(x) + 1) / len(x), label=name, **line_style(i))
    for axis, what in zip(axes, ("TTFT", "E2E latency"), strict=True):
        axis.set(xscale="log", xlabel=f"{what}, s", ylabel="share of requests")
    axes[1].legend(fontsize=8, loc="lower right")
    return as_image(figure, "Cumulative distributions of TTFT and E2E latency")


def load_figure(result: Evaluation) -> str:
    """Latency, goodput and SLO attainment over the load."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    metrics = (
        ("e2e_mean_s", "mean E2E, s"),
        ("goodput_rps", "goodput, requests/s"),
        ("slo_attainment", "within limits"),
    )
    for i, name in enumerate(shown_policies(result, result.loads[-1])):
        for axis, (metric, _) in zip(axes, metrics, strict=True):
            y = [result.mean(name, load, metric) for load in result.loads]
            axis.plot(result.loads, y, marker="o", markersize=4, label=name, **line_style(i))
    for axis, (_, label) in zip(axes, metrics, strict=True):
        axis.set(xlabel="load", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    return as_image(figure, "Mean latency, goodput and SLO attainment over the load")


def gantt_figure(result: Evaluation, load: float, names: list[str]) -> str:
    """What each replica does in a stretch of the run, as an image."""
    return as_image(
        draw_gantt(result, load, names), "Gantt chart of the replicas under " + " and ".join(names)
    )


def draw_gantt(result: Evaluation, load: float, names: list[str], span_s: float = 6.0) -> Any:
    """Draw what each replica does in a stretch of the run: prefill, decode or nothing."""
    plt = pyplot()
    figure, axes = plt.subplots(len(names), 1, figsize=(12, 2.6 * len(names)), squeeze=False)
    fleet = result.scenario.episode(result.seeds[0], num_requests=1).type_idx
    gpus = [result.scenario.spec.types[t].name for t in fleet]
    for axis, name in zip(axes[:, 0], names, strict=True):
        steps = result.trails[name, load].steps
        begin = float(np.median(steps["begin_s"]))
        part = steps[(steps["end_s"] > begin) & (steps["begin_s"] < begin + span_s)]
        for prefill, color, label in ((False, "#56B4E9", "decode"), (True, "#D55E00", "prefill")):
            rows = part[(part["prefill_tokens"] > 0) == prefill]
            axis.barh(
                rows["replica"],
                rows["end_s"] - rows["begin_s"],
                left=rows["begin_s"] - begin,
                height=0.8,
                color=color,
                label=label,
                linewidth=0,
            )
        axis.set(title=name, xlim=(0, span_s), yticks=range(len(gpus)), yticklabels=gpus)
        axis.grid(visible=False)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("s")
    axes[0, 0].legend(fontsize=8, ncol=2, loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def balance_figure(result: Evaluation, load: float, names: list[str]) -> str:
    """Decoding requests of each replica over time."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(names), figsize=(12, 3.4), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        steps = result.trails[name, load].steps
        for r in range(int(steps["replica"].max()) + 1):
            rows = steps[steps["replica"] == r]
            axis.plot(
                rows["begin_s"],
                rows["num_decodes"] + rows["num_waiting"],
                linewidth=1,
                label=str(r),
                **line_style(r),
            )
        axis.set(title=name, xlabel="s")
    axes[0, 0].set_ylabel("requests decoding or waiting")
    axes[0, -1].legend(title="replica", fontsize=7, ncol=2)
    return as_image(figure, "Load of each replica over time")


def ratio_figure(result: Evaluation, load: float) -> str:
    """Paired ratios of mean E2E to the best rule, with intervals."""
    plt = pyplot()
    best = result.best_heuristic(load)
    ranked = reversed(result.ranking(load))  # the best on top
    rows = [(n, result.ratio(n, best, load)) for n, _ in ranked]
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1.2))
    for y, (name, r) in enumerate(rows):
        color = PALETTE[1] if name in result.learned else PALETTE[0]
        if r.num_pairs > 1:
            axis.plot([r.low, r.high], [y, y], color=color, linewidth=2)
        axis.plot(r.value, y, "o", color=color)
    axis.axvline(1.0, color="gray", linewidth=1)
    axis.set(
        xscale="log",
        yticks=range(len(rows)),
        yticklabels=[n for n, _ in rows],
        xlabel=f"{result.judged_name} over that of {best}{result.interval_suffix}",
    )
    return as_image(figure, f"Paired ratios of {result.judged_name} with intervals")
