"""The comparison of online schedulers of jobs as one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path

import servegym
from servegym.evaluate.report import (
    STYLE,
    episodes_text,
    paired_text,
    saturation_part,
    seeds_part,
)
from servegym.evaluate.workflow import COLUMNS, WorkflowEvaluation
from servegym.evaluate.workflow_figures import (
    against_figure,
    jct_figure,
    load_figure,
    shown_policies,
)
from servegym.evaluate.workflow_gantt import gantt_charts
from servegym.whole_files import write_whole
from servegym.workflow.gantt_page import SCRIPT
from servegym.workflow.gantt_page import STYLE as GANTT_STYLE


def write_workflow_report(result: WorkflowEvaluation, path: Path) -> None:
    """Write the page; it needs nothing but itself."""
    write_whole({path: workflow_page(result).encode()})


def workflow_page(result: WorkflowEvaluation) -> str:
    """Return the page's HTML."""
    top = result.loads[-1]
    scenario = result.scenario
    verdict = "".join(f"<p>{_verdict(result, load)}</p>" for load in result.loads)
    tables = "".join(_table(result, load) for load in result.loads)
    few = seeds_part(result)
    comparison = (
        "Points: percentage points above the best rule that is no oracle"
        if result.judged_by_share
        else f"Ratio: {result.judged_name} over that of the best rule that is no oracle"
    )
    charts = "".join(
        f"<h3>{html.escape(name)}</h3>{chart}"
        for name, chart in gantt_charts(result, top, shown_policies(result, top)).items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: {html.escape(scenario.name)}</title><style>{STYLE}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .3rem; }}{GANTT_STYLE}</style></head><body>
<h1>{html.escape(scenario.name)}</h1>
<p>{html.escape(scenario.description)}</p>
{verdict}{few}
<h2>Results</h2>{tables}
<p class="note">{episodes_text(result)}, the same for every policy, all of
their jobs counted. {comparison}{paired_text(result)}. Slowdown is
against the job alone on the fastest devices. Oracles know true durations, output lengths and hidden
stages.</p>
<h2>How far from the best rule (load {top:g})</h2>{against_figure(result, top)}
<p class="note">The line is the best rule. Learned policies are orange.</p>
<h2>Completion and waiting (load {top:g}, first episode)</h2>{jct_figure(result, top)}
<p class="note">Higher and further left is better. JCT: from arrival to the end of the last stage.
</p>
<h2>Over the load</h2>{load_figure(result)}{saturation_part(result, "jobs in time")}
<h2>What the devices do (load {top:g}, first episode)</h2>
<p><label>zoom <input class="zoom" type="range" min="1" max="20" step="0.5" value="1"></label>
A stretch from the middle of the arrivals, the same under every policy. A row is a slot of a device,
a colour a job; bars are named job.stage. A stage under the cursor shows its times; what it waits
for is outlined, what waits for it is dashed. Tools have no device.</p>
{charts}
<p class="note">servegym {servegym.__version__}</p>
<script>{SCRIPT}</script></body></html>
"""


def _verdict(result: WorkflowEvaluation, load: float) -> str:
    best = result.best_heuristic(load)
    parts = []
    for name in result.learned:
        _, low, high = result.against(name, best, load)
        same = 0.0 if result.judged_by_share else 1.0
        if len(result.seeds) == 1:
            word = "in one episode beside"
        elif low <= same <= high:
            word = "not distinguishable from"
        else:
            word = "better than" if (low > same) == result.judged_by_share else "worse than"
        parts.append(
            f"{html.escape(name)} is {word} {html.escape(best)}: {result.against_heading}"
            f" {result.against_text(name, best, load)}"
        )
    head = f"Load {load:g}: the best rule is <b>{html.escape(best)}</b>. "
    return head + "; ".join(parts) + ("." if parts else "")


def _table(result: WorkflowEvaluation, load: float) -> str:
    best = result.best_heuristic(load)
    rows = []
    for name, information in result.ranking(load):
        kind = "learned" if name in result.learned else information
        cells = "".join(
            f"<td>{k * result.mean(name, load, m):,.{d}f}</td>" for _, m, k, d in COLUMNS
        )
        p50 = result.decision_s[name][0] * 1e6
        rows.append(
            f'<tr class="{kind}"><td>{html.escape(name)}</td><td>{information}</td>{cells}'
            f"<td>{result.against_text(name, best, load)}</td><td>{p50:,.0f}</td></tr>"
        )
    heads = "".join(f"<th>{heading}</th>" for heading, *_ in COLUMNS)
    return (
        f"<h3>Load {load:g}</h3><div class='scroll'><table><tr><th>policy</th><th>knows</th>"
        f"{heads}<th>{result.against_heading}</th><th>µs/decision</th></tr>{''.join(rows)}"
        "</table></div>"
    )
