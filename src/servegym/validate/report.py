"""A validation as one self-contained page."""

from __future__ import annotations

from pathlib import Path

import servegym
from servegym.validate.plots import cdf_figure, error_figure, scatter_figure, series_figure
from servegym.validate.score import Validation
from servegym.validate.tables import published_tables, run_tables, skipped_files_table
from servegym.whole_files import write_whole

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
p.note { color: #777; font-size: .9rem; }
"""


def write_report(result: Validation, path: Path) -> None:
    """Write the page; it needs nothing but itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: report_page(result).encode()})


def report_page(result: Validation) -> str:
    """Return the page's HTML."""
    parts = []
    if result.runs:
        summary, *each = run_tables(result)
        parts.append("<h2>Replayed runs</h2>" + summary.html())
        for score, table in zip(result.runs, each, strict=True):
            parts.append(table.html() + cdf_figure(score) + series_figure(score))
    if result.skipped_files:
        parts.append(skipped_files_table(result).html())
    if result.rows or result.skipped_rows:
        parts.append("<h2>Published measurements</h2>")
        if result.rows:
            parts.append(scatter_figure(result.rows) + error_figure(result.rows))
        parts += [table.html() for table in published_tables(result)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: simulator against engines</title><style>{STYLE}</style></head><body>
<h1>Simulator against real engines</h1>
{"".join(parts)}
<p class="note">servegym {servegym.__version__}</p>
</body></html>
"""
