"""Figures of the report on online schedulers of jobs."""

from __future__ import annotations

import numpy as np

from servegym.evaluate.plots import PALETTE, as_image, line_style, pyplot
from servegym.evaluate.workflow import WorkflowEvaluation


def shown_policies(result: WorkflowEvaluation, load: float, limit: int = 8) -> list[str]:
    """The learned policies, the best ones and the worst: what plots have room for."""
    order = [name for name, _ in result.ranking(load)]
    unique = list(dict.fromkeys([*result.learned, *order]))
    return [*unique[: limit - 1], order[-1]] if len(unique) > limit else unique


def against_figure(result: WorkflowEvaluation, load: float) -> str:
    """Paired comparison with the best rule by the objective, with intervals."""
    plt = pyplot()
    best = result.best_heuristic(load)
    ranked = [name for name, _ in reversed(result.ranking(load))]  # the best on top
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(ranked) + 1.2))
    for y, name in enumerate(ranked):
        value, low, high = result.against(name, best, load)
        color = PALETTE[1] if name in result.learned else PALETTE[0]
        if np.isfinite((low, high)).all() and len(result.seeds) > 1:
            axis.plot([low, high], [y, y], color=color, linewidth=2)
        axis.plot(value, y, "o", color=color)
    relation = "minus" if result.judged_by_share else "over"
    unit = ", percentage points" if result.judged_by_share else ""
    axis.axvline(0.0 if result.judged_by_share else 1.0, color="gray", linewidth=1)
    axis.set(
        xscale="linear" if result.judged_by_share else "log",
        yticks=range(len(ranked)),
        yticklabels=ranked,
        xlabel=f"{result.judged_name} {relation} that of {best}{unit}{result.interval_suffix}",
    )
    return as_image(figure, f"Paired comparison of {result.judged_name} with intervals")


def jct_figure(result: WorkflowEvaluation, load: float) -> str:
    """Distributions of completion time and of waiting for a device in the first episode."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for i, name in enumerate(shown_policies(result, load)):
        trail = result.job_trails[name, load]
        jobs, stages = trail.jobs, trail.stages
        waits_s = (stages["start_s"] - stages["ready_s"])[stages["device"] >= 0]
        for axis, values in zip(axes, (jobs["finish_s"] - jobs["arrival_s"], waits_s), strict=True):
            share = np.arange(1, len(values) + 1) / len(values)
            axis.plot(np.sort(values), share, label=name, **line_style(i))
    axes[0].set(xscale="log", xlabel="JCT, s", ylabel="share of jobs")
    # most stages of a good policy do not wait at all, which a logarithm cannot show
    axes[1].set_xscale("symlog", linthresh=0.1)
    axes[1].set(xlabel="wait for a device, s", ylabel="share of stages", xlim=(0, None))
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return as_image(figure, "Cumulative distributions of job completion times and waits")


def load_figure(result: WorkflowEvaluation) -> str:
    """Mean and tail of completion times, and deadline attainment, over the load."""
    plt = pyplot()
    metrics = [("jct_mean_s", "mean JCT, s"), ("jct_p95_s", "p95 JCT, s")]
    first = next(iter(result.job_trails.values()))
    if np.isfinite(first.jobs["deadline_s"]).any():
        metrics.append(("deadline_attainment", "in time"))
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.4 * len(metrics), 3.8))
    for i, name in enumerate(shown_policies(result, result.loads[-1])):
        for axis, (metric, _) in zip(axes, metrics, strict=True):
            y = [result.mean(name, load, metric) for load in result.loads]
            axis.plot(result.loads, y, marker="o", markersize=4, label=name, **line_style(i))
    for axis, (metric, label) in zip(axes, metrics, strict=True):
        scale = "linear" if metric == "deadline_attainment" else "log"
        axis.set(xlabel="load", ylabel=label, yscale=scale)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    figure.tight_layout()
    return as_image(figure, "Completion times and deadline attainment over the load")
