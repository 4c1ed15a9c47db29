"""Figures that problems make of their own columns: curves over the load, distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from servegym.drawing import as_image, line_style, pyplot
from servegym.problems.problem import Comparison
from servegym.typing import FloatArray


class Curve(NamedTuple):
    """A panel of curves over the load: a metric, its label and the scale of its axis."""

    metric: str
    label: str
    scale: str = "log"


class Distribution(NamedTuple):
    """A panel of cumulative distributions.

    Attributes:
        label: Of the values.
        of: Whose share is shown, such as "requests".
        values: Takes them out of a trail, `float64[n]`; those that are NaN are left out.
        scale: Settings of the axis of values.
    """

    label: str
    of: str
    values: Callable[[Any], FloatArray]
    scale: dict[str, Any]


def curves_figure(result: Comparison, curves: Sequence[Curve]) -> str:
    """Draw metrics over the load."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(curves), figsize=(4.4 * len(curves), 3.8), squeeze=False)
    for i, name in enumerate(result.shown_policies(result.loads[-1])):
        for axis, curve in zip(axes[0], curves, strict=True):
            y = [result.mean(name, load, curve.metric) for load in result.loads]
            axis.plot(result.loads, y, marker="o", markersize=4, label=name, **line_style(i))
    for axis, curve in zip(axes[0], curves, strict=True):
        axis.set(xlabel="load", ylabel=curve.label, yscale=curve.scale)
    _legend(axes[0, -1])
    figure.tight_layout()
    return as_image(figure, f"{', '.join(curve.label for curve in curves)} over the load")


def distributions_figure(
    result: Comparison, load: float, distributions: Sequence[Distribution]
) -> str:
    """Draw cumulative distributions of the first episode."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(distributions), figsize=(11, 3.8), squeeze=False)
    for i, name in enumerate(result.shown_policies(load)):
        for axis, panel in zip(axes[0], distributions, strict=True):
            values = panel.values(result.trails[name, load])
            x = np.sort(values[~np.isnan(values)])
            axis.plot(x, np.arange(1, len(x) + 1) / len(x), label=name, **line_style(i))
    for axis, panel in zip(axes[0], distributions, strict=True):
        axis.set_xscale(**panel.scale)
        axis.set(xlabel=panel.label, ylabel=f"share of {panel.of}")
        if panel.scale["value"] != "log":
            axis.set_xlim(0, None)
    _legend(axes[0, -1])
    labels = " and ".join(panel.label for panel in distributions)
    return as_image(figure, f"Cumulative distributions of {labels}")


def contrasted(result: Comparison, load: float) -> list[str]:
    """Name a learned policy, the best rule and the worst policy: what charts have room for."""
    worst = result.ranking(load)[-1][0]
    return list(dict.fromkeys([*result.learned[:1], result.best_heuristic(load), worst]))


def _legend(axis: Any) -> None:
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
