"""A replay as one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path

import servegym
from servegym.replay.plots import cdf_figure, drift_figure
from servegym.replay.result import Replayed
from servegym.replay.sentences import sentence
from servegym.replay.tables import (
    counterfactual_table,
    counts_table,
    drift_table,
    error_table,
    held_out_table,
)
from servegym.validate.report import STYLE
from servegym.whole_files import write_whole


def write_report(result: Replayed, path: Path) -> None:
    """Write the page; it needs nothing but itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: report_page(result).encode()})


def report_page(result: Replayed) -> str:
    """Return the page's HTML."""
    verdicts = "".join(f"<li>{html.escape(sentence(one))}</li>" for one in result.drift.replicas)
    parts = [
        f"<ul>{verdicts}</ul>",
        counts_table(result).html(),
        "<h2>Predicted and observed</h2>",
        error_table(result).html(),
        cdf_figure(result),
        "<h2>Drift</h2>",
        drift_table(result).html(),
    ]
    for r, drift in enumerate(result.drift.replicas):
        if drift.stretches:
            parts.append(f"<h3>{html.escape(drift.name)}</h3>")
            parts += [drift_figure(drift), cdf_figure(result, r)]
    if result.held_out is not None:
        parts.append(held_out_table(result.held_out).html())
    parts += ["<h2>Other policies</h2>", counterfactual_table(result).html()]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: replay of a decision log</title><style>{STYLE}</style></head><body>
<h1>Replay of a decision log</h1>
{"".join(parts)}
<p class="note">servegym {servegym.__version__}</p>
</body></html>
"""
