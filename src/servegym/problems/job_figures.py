"""Figures of the problem of jobs."""

from __future__ import annotations

import html
from typing import Any

import numpy as np

from servegym.problems.figures import (
    Curve,
    Distribution,
    contrasted,
    curves_figure,
    distributions_figure,
)
from servegym.problems.job_gantt import JobTrail, draw_episodes, gantt_charts
from servegym.problems.problem import Comparison, Figure
from servegym.typing import FloatArray
from servegym.workflow.gantt_page import SCRIPT, STYLE


def _jct_s(trail: JobTrail) -> FloatArray:
    found: FloatArray = trail.jobs["finish_s"] - trail.jobs["arrival_s"]
    return found


def _wait_s(trail: JobTrail) -> FloatArray:
    waited: FloatArray = trail.stages["start_s"] - trail.stages["ready_s"]
    return waited[trail.stages["device"] >= 0]


_DISTRIBUTIONS = (
    Distribution("JCT, s", "jobs", _jct_s, {"value": "log"}),
    # most stages of a good policy do not wait at all, which a logarithm cannot show
    Distribution("wait for a device, s", "stages", _wait_s, {"value": "symlog", "linthresh": 0.1}),
)


def _over_load(result: Comparison, _: float) -> str:
    curves = [Curve("jct_mean_s", "mean JCT, s"), Curve("jct_p95_s", "p95 JCT, s")]
    first = next(iter(result.trails.values()))
    if np.isfinite(first.jobs["deadline_s"]).any():
        curves.append(Curve("deadline_attainment", "in time", "linear"))
    return curves_figure(result, curves)


def plot_devices(result: Comparison, load: float) -> Any:
    """Draw a stretch under a learned policy, the best rule and the worst policy."""
    return draw_episodes(result, load, contrasted(result, load))


def _devices(result: Comparison, load: float) -> str:
    charts = gantt_charts(result, load, result.shown_policies(load))
    slider = (
        '<p><label>zoom <input class="zoom" type="range" min="1" max="20" step="0.5" value="1">'
        "</label></p>"
    )
    return slider + "".join(f"<h3>{html.escape(name)}</h3>{c}" for name, c in charts.items())


JOB_FIGURES = (
    Figure(
        "Completion and waiting (load {load:g}, first episode)",
        lambda result, load: distributions_figure(result, load, _DISTRIBUTIONS),
        "Higher and further left is better. JCT: from arrival to the end of the last stage.",
    ),
    Figure("Over the load", _over_load),
    Figure(
        "What the devices do (load {load:g}, first episode)",
        _devices,
        "A stretch from the middle of the arrivals, the same under every policy. A row is a slot of"
        " a device, a colour a job; bars are named job.stage. A stage under the cursor shows its"
        " times; what it waits for is outlined, what waits for it is dashed. Tools have no device.",
        style=STYLE,
        script=SCRIPT,
    ),
)
