"""The comparison as one self-contained page, with the figures of its problem."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import servegym
from servegym.drawing import PALETTE, as_image, pyplot
from servegym.evaluate.harness import CLAIRVOYANT, Evaluation
from servegym.evaluate.table import saturation_cells, stability_cells
from servegym.problems.problem import Section
from servegym.whole_files import write_whole

#: Of pages with results.
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td:first-child, td:nth-child(2) { white-space: nowrap; }
td:nth-last-child(2) { white-space: nowrap; }
tr.learned { font-weight: 600; background: var(--soft); } tr.oracle { opacity: .65; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
p.note { color: #777; font-size: .9rem; }
"""


def write_report(result: Evaluation, path: Path, sections: Sequence[Section] = ()) -> None:
    """Write the page; it needs nothing but itself.

    Args:
        result: What is shown.
        path: Where to.
        sections: What else is to be said.
    """
    write_whole({path: report_page(result, sections).encode()})


def report_page(result: Evaluation, sections: Sequence[Section] = ()) -> str:
    """Return the page's HTML."""
    top = result.loads[-1]
    scenario, problem = result.scenario, result.problem
    verdicts = "".join(f"<p>{_verdict(result, load)}</p>" for load in result.loads)
    tables = "".join(_table(result, load) for load in result.loads)
    figures = "".join(
        f"<h2>{html.escape(figure.title.format(load=top))}</h2>{figure.draw(result, top)}"
        f'<p class="note">{html.escape(figure.note)}</p>'
        for figure in problem.figures
    )
    style = STYLE + "".join(figure.style for figure in problem.figures)
    script = "".join(f"<script>{f.script}</script>" for f in problem.figures if f.script)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: {html.escape(scenario.name)}</title><style>{style}</style></head><body>
<h1>{html.escape(scenario.name)}</h1>
<p>{html.escape(scenario.description)}</p>
{verdicts}{_remarks(result)}
<h2>Results</h2>{tables}
<p class="note">{_episodes(result)}, the same for every policy; {problem.counted}.
{_comparison(result)}. Oracles know {problem.truth}.{_bound(result)}</p>
<h2>How far from the best rule (load {top:g})</h2>{_against_figure(result, top)}
<p class="note">The line is the best rule. Learned policies are orange.</p>
{_sections(sections)}{_stability(result)}{_saturation(result)}{figures}
<p class="note">servegym {servegym.__version__}</p>
{script}</body></html>
"""


def _sections(sections: Sequence[Section]) -> str:
    """Show what is said beside the comparison."""
    shown = ""
    for section in sections:
        said = "".join(f"<p>{html.escape(text)}</p>" for text in section.sentences)
        shown += f"<h2>{html.escape(section.title)}</h2>{said}{section.figure}"
        shown += f'<p class="note">{html.escape(section.note)}</p>'
    return shown


def _verdict(result: Evaluation, load: float) -> str:
    best, objective = result.best_heuristic(load), result.objective
    parts = []
    for name in result.learned:
        found = result.against(name, best, load)
        word = "in one episode beside"
        if found.num_pairs > 1:
            word = objective.verdict(found.low, found.high)
        parts.append(
            f"{html.escape(name)} is {word} {html.escape(best)}: {objective.heading}"
            f" {result.against_text(name, best, load)}"
        )
    head = f"Load {load:g}: the best rule is <b>{html.escape(best)}</b>. "
    return head + "; ".join(parts) + ("." if parts else "")


def _remarks(result: Evaluation) -> str:
    """Say what must be known of the trace and the seeds before the numbers are read."""
    said = list(result.remarks)
    if len(result.seeds) == 1:
        said.append("A single episode: there are no intervals.")
    elif len(result.seeds) < 10:
        said.append(f"Only {len(result.seeds)} seeds: read the intervals with care.")
    return "".join(f'<p class="note">{html.escape(text)}</p>' for text in said)


def _episodes(result: Evaluation) -> str:
    """Say what the numbers of a table are."""
    count = len(result.seeds)
    return f"Means over {count} held-out episodes" if count > 1 else "One held-out episode"


def _comparison(result: Evaluation) -> str:
    """Say how a comparison was made."""
    objective = result.objective
    said = f"Ratio: {objective.label} over that of the best rule that is no oracle"
    if objective.is_share:
        said = "Points: percentage points above the best rule that is no oracle"
    if len(result.seeds) == 1:
        return said
    return f"{said}, paired by episode, with its 95 % bootstrap interval"


def _bound(result: Evaluation) -> str:
    """Say what the bound and the share of the headroom are."""
    if result.bound_budget <= 0:
        return ""
    return (
        f" {CLAIRVOYANT}: an offline search that knows the future, {result.bound_budget:g} episodes"
        " of simulation each; knowing it brings at least so much. Headroom: 0 is the best rule,"
        " 100 is what the search found"
        f"{result.interval_suffix}."
    )


def _stability(result: Evaluation) -> str:
    """Tabulate bands over worlds, and say how stable the ranking is, if that was asked."""
    stability = result.stability
    if stability is None:
        return ""
    shown = f"<h2>In {stability.num_worlds} worlds with other kernels and engines</h2>"
    for load in result.loads:
        heads, rows = stability_cells(result, load)
        said = html.escape("; ".join(stability.sentences(load)))
        shown += f"<h3>Load {load:g}</h3><div class='scroll'>{_html_table(heads, rows)}</div>"
        shown += f"<p>{said}</p>" if said else ""
    return (
        shown + '<p class="note">Bands that nine of ten worlds lie in; first in: worlds in which '
        "no other policy is better. See docs/evaluation.md.</p>"
    )


def _saturation(result: Evaluation) -> str:
    """Tabulate the largest loads, if they were searched."""
    if not result.saturation:
        return ""
    heads, rows = saturation_cells(result)
    return f"<h2>Largest load</h2>{_html_table(['policy', *heads], rows)}"


def _table(result: Evaluation, load: float) -> str:
    best, columns = result.best_heuristic(load), result.problem.columns
    rows, kinds = [], []
    for name, information in result.ranking(load):
        kinds.append("learned" if name in result.learned else information)
        cells = [column.cell(result.mean(name, load, column.metric)) for column in columns]
        if result.bound_budget > 0:
            cells.append(result.headroom_text(name, load))
        taken = result.decision_s.get(name)
        p50_us = f"{1e6 * taken[0]:,.0f}" if taken else "-"
        rows.append([name, information, *cells, result.against_text(name, best, load), p50_us])
    named = [column.heading for column in columns]
    if result.bound_budget > 0:
        named.append("headroom %")
    heads = ["policy", "knows", *named, result.objective.heading, "µs/decision"]
    return f"<h3>Load {load:g}</h3><div class='scroll'>{_html_table(heads, rows, kinds)}</div>"


def _html_table(heads: list[str], rows: list[list[str]], kinds: list[str] | None = None) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = ""
    for row, kind in zip(rows, kinds or [""] * len(rows), strict=True):
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in row)
        body += f'<tr class="{kind}">{cells}</tr>'
    return f"<table><tr>{head}</tr>{body}</table>"


def _against_figure(result: Evaluation, load: float) -> str:
    """Paired comparisons with the best rule by the objective, with intervals."""
    plt = pyplot()
    best, objective = result.best_heuristic(load), result.objective
    ranked = [name for name, _ in reversed(result.ranking(load))]  # the best on top
    figure, axis = plt.subplots(figsize=(8, 0.32 * len(ranked) + 1.2))
    for y, name in enumerate(ranked):
        found = result.against(name, best, load)
        color = PALETTE[1] if name in result.learned else PALETTE[0]
        if found.num_pairs > 1:
            bounds = objective.factor * np.array((found.low, found.high))
            axis.plot(bounds, [y, y], color=color, linewidth=2)
        axis.plot(objective.factor * found.value, y, "o", color=color)
    unit = ", percentage points" if objective.is_share else ""
    axis.axvline(objective.neutral, color="gray", linewidth=1)
    axis.set(
        xscale="linear" if objective.is_share else "log",
        yticks=range(len(ranked)),
        yticklabels=ranked,
        xlabel=f"{objective.label} {objective.relation} that of {best}{unit}"
        f"{result.interval_suffix}",
    )
    return as_image(figure, f"Paired comparison of {objective.label} with intervals")
