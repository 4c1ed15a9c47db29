"""An answer as one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import servegym
from servegym.drawing import PALETTE, as_image, pyplot
from servegym.plan.answer import Answer, Candidate
from servegym.plan.tables import effort, fleets_table, reasons, remarks, safety, verdict
from servegym.validate.report import STYLE
from servegym.whole_files import write_whole


def write_report(result: Answer, path: Path) -> None:
    """Write the page; it needs nothing but itself."""
    write_whole({path: report_page(result).encode()})


def report_page(result: Answer) -> str:
    """Return the page's HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: plan of a fleet</title><style>{STYLE}</style></head><body>
<h1>Plan of a fleet</h1>
<p>{html.escape(verdict(result))}.</p>{_list(safety(result))}
{fleets_table(result).html()}
<h2>Why not the others</h2>{_list(reasons(result))}
<h2>Rent and requests in time</h2>{_figure(result)}
<p class="note">Fleets that were tried on the whole trace, up to three times the rent of the answer.
The line joins those that no cheaper one equals; dashed: the share asked for.</p>
<h2>Prices, and what was left out</h2>{_list(remarks(result))}
<p class="note">{effort(result)}. servegym {servegym.__version__}</p>
</body></html>
"""


def _list(sentences: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in sentences) + "</ul>"


def _figure(result: Answer) -> str:
    alt = "Share of requests that are late against rent, one point a fleet"
    return as_image(frontier_figure(result), alt)


def frontier_figure(result: Answer) -> Any:
    """Draw the share of requests that are late against rent; return a Matplotlib figure."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(9, 5))
    least = 0.5 / result.num_requests  # where none is late, on a logarithmic axis
    shown = _near(result)
    groups = sorted({_gpus(result, one) for one in shown})
    for i, gpus in enumerate(groups):
        points = [
            (one.usd_per_h, max(1.0 - one.trial.attainment, least))
            for one in shown
            if _gpus(result, one) == gpus
        ]
        color = PALETTE[(i + 2) % len(PALETTE)] if i else PALETTE[0]
        axis.plot(*zip(*points, strict=True), "o", color=color, alpha=0.6, label=gpus)
    line = [
        (one.usd_per_h, max(1.0 - one.trial.attainment, least))
        for one in result.frontier
        if one in shown
    ]
    axis.plot(*zip(*line, strict=True), color="gray", linewidth=1, drawstyle="steps-post")
    asked = 1.0 - result.question.attainment
    if asked > 0:
        axis.axhline(asked, color="gray", linestyle="--", linewidth=1)
    if result.best is not None:
        at = (result.best.usd_per_h, max(1.0 - result.best.trial.attainment, least))
        axis.plot(*at, "*", color=PALETTE[1], markersize=16, label="answer", zorder=3)
        axis.annotate(
            result.best.name, at, xytext=(8, 8), textcoords="offset points", color=PALETTE[1]
        )
    axis.set(
        yscale="log",
        xlabel="rent, dollars an hour",
        ylabel="share of the requests that are late",
    )
    axis.legend()
    return figure


def _near(result: Answer) -> list[Candidate]:
    """Fleets of up to three times the rent of the answer, as far as there is one."""
    if result.best is None:
        return list(result.shown)
    limit = 3.0 * result.best.usd_per_h
    return [one for one in result.shown if one.usd_per_h <= limit]


def _gpus(result: Answer, one: Candidate) -> str:
    """Name the GPUs of a fleet."""
    counts = zip(result.options, one.trial.fleet, strict=True)
    return " and ".join(sorted({option.entry.gpu for option, count in counts if count}))
