"""Figures of problems of requests."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.outcome import latencies
from servegym.drawing import as_image, line_style, pyplot
from servegym.problems.figures import (
    Curve,
    Distribution,
    contrasted,
    curves_figure,
    distributions_figure,
)
from servegym.problems.problem import Comparison, Figure


class Trail(NamedTuple):
    """What figures need of one run.

    Attributes:
        outcomes: `OUTCOME_DTYPE[num_requests]`.
        steps: `STEP_DTYPE[num_steps]`.
        replicas: Name of each replica's type.
    """

    outcomes: NDArray[np.void]
    steps: NDArray[np.void]
    replicas: tuple[str, ...]


_CURVES = (
    Curve("e2e_mean_s", "mean E2E, s"),
    Curve("goodput_rps", "goodput, requests/s", "linear"),
    Curve("slo_attainment", "within limits", "linear"),
)
#: Length of the stretch that is drawn, seconds.
_SPAN_S = 6.0
_LOG = {"value": "log"}
_DISTRIBUTIONS = (
    Distribution("TTFT, s", "requests", lambda trail: latencies(trail.outcomes)[0], _LOG),
    Distribution("E2E latency, s", "requests", lambda trail: latencies(trail.outcomes)[2], _LOG),
)


def draw_replicas(result: Comparison, load: float, names: list[str]) -> Any:
    """Draw what each replica does in a stretch of the run: prefill, decode or nothing."""
    plt = pyplot()
    figure, axes = plt.subplots(len(names), 1, figsize=(12, 2.6 * len(names)), squeeze=False)
    gpus = result.trails[names[0], load].replicas
    for axis, name in zip(axes[:, 0], names, strict=True):
        steps = result.trails[name, load].steps
        begin = float(np.median(steps["begin_s"]))
        part = steps[(steps["end_s"] > begin) & (steps["begin_s"] < begin + _SPAN_S)]
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
        axis.set(title=name, xlim=(0, _SPAN_S), yticks=range(len(gpus)), yticklabels=gpus)
        axis.grid(visible=False)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("s")
    axes[0, 0].legend(fontsize=8, ncol=2, loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def plot_replicas(result: Comparison, load: float) -> Any:
    """Draw a stretch under a learned policy, the best rule and the worst policy."""
    return draw_replicas(result, load, contrasted(result, load))


def _replicas(result: Comparison, load: float) -> str:
    names = contrasted(result, load)[:2]
    title = "Gantt chart of the replicas under " + " and ".join(names)
    return as_image(draw_replicas(result, load, names), title)


def _balance(result: Comparison, load: float) -> str:
    plt = pyplot()
    names = contrasted(result, load)[:2]
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


REQUEST_FIGURES = (
    Figure(
        "Latency distributions (load {load:g}, first episode)",
        lambda result, load: distributions_figure(result, load, _DISTRIBUTIONS),
        "Higher and further left is better. TTFT shows queueing and prefill, E2E all.",
    ),
    Figure("Over the load", lambda result, _: curves_figure(result, _CURVES)),
    Figure(
        "What the replicas do",
        _replicas,
        "A few seconds from the middle of the first episode; gaps are idle time.",
    ),
    Figure(
        "Load of the replicas over time",
        _balance,
        "On a mixed fleet equal curves are not the aim: a fast replica should carry more.",
    ),
)
