"""The comparison as one self-contained page."""

from __future__ import annotations

import html
from pathlib import Path

import servegym
from servegym.evaluate.compare import with_interval
from servegym.evaluate.harness import Evaluation
from servegym.evaluate.plots import (
    balance_figure,
    cdf_figure,
    gantt_figure,
    load_figure,
    ratio_figure,
)
from servegym.evaluate.table import COLUMNS
from servegym.whole_files import write_whole

#: Of pages with results.
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
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


def write_report(result: Evaluation, path: Path) -> None:
    """Write the page; it needs nothing but itself."""
    write_whole({path: report_page(result).encode()})


def report_page(result: Evaluation) -> str:
    """Return the page's HTML."""
    top = result.loads[-1]
    best = result.best_heuristic(top)
    compared = list(dict.fromkeys([*result.learned[:1], best, "round-robin"]))
    names = [n for n in compared if any(n == p for p, _ in result.policies)][:2]
    verdict = "".join(f"<p>{_verdict(result, load)}</p>" for load in result.loads)
    tables = "".join(_table(result, load) for load in result.loads)
    few = seeds_part(result)
    scenario = result.scenario
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: {html.escape(scenario.name)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(scenario.name)}</h1>
<p>{html.escape(scenario.description)}</p>
{verdict}{few}
<h2>Results</h2>{tables}
<p class="note">{episodes_text(result)}, the same for every policy;
the first 20 % of the requests are left out, runs are drained. Ratio: {result.judged_name} over
that of the best rule that is no oracle{paired_text(result)}.
Oracles know the true output lengths.</p>
<h2>How far from the best rule (load {top:g})</h2>{ratio_figure(result, top)}
<p class="note">The line is the best rule. Learned policies are orange.</p>
<h2>Latency distributions (load {top:g}, first episode)</h2>{cdf_figure(result, top)}
<p class="note">Higher and further left is better. TTFT shows queueing and prefill, E2E all.</p>
<h2>Over the load</h2>{load_figure(result)}{saturation_part(result)}
<h2>What the replicas do</h2>{gantt_figure(result, top, names)}
<p class="note">A few seconds from the middle of the first episode; gaps are idle time.</p>
<h2>Load of the replicas over time</h2>{balance_figure(result, top, names)}
<p class="note">On a mixed fleet equal curves are not the aim: a fast replica should carry more.</p>
<p class="note">servegym {servegym.__version__}</p>
</body></html>
"""


def _verdict(result: Evaluation, load: float) -> str:
    best = result.best_heuristic(load)
    parts = []
    for name in result.learned:
        r = result.ratio(name, best, load)
        goodput = result.judged_by == "goodput_rps"
        if r.num_pairs < 2:
            word = "in one episode beside"
        elif r.high < 1:
            word = "behind" if goodput else "faster than"
        elif r.low > 1:
            word = "ahead of" if goodput else "slower than"
        else:
            word = "not distinguishable from"
        parts.append(f"{html.escape(name)} is {word} {html.escape(best)}: ratio {with_interval(r)}")
    head = f"Load {load:g}: the best rule is <b>{html.escape(best)}</b>. "
    return head + "; ".join(parts) + ("." if parts else "")


def seeds_part(result: Evaluation) -> str:
    """Return what must be known of the trace and the seeds before the numbers are read."""
    said = list(result.remarks)
    if len(result.seeds) == 1:
        said.append("A single episode: there are no intervals.")
    elif len(result.seeds) < 10:
        said.append(f"Only {len(result.seeds)} seeds: read the intervals with care.")
    return "".join(f'<p class="note">{html.escape(text)}</p>' for text in said)


def episodes_text(result: Evaluation) -> str:
    """Return what the numbers of a table are."""
    count = len(result.seeds)
    return f"Means over {count} held-out episodes" if count > 1 else "One held-out episode"


def paired_text(result: Evaluation) -> str:
    """Return how a comparison was made, as the end of a sentence."""
    if len(result.seeds) == 1:
        return ""
    return ", paired by episode, with its 95 % bootstrap interval"


def saturation_part(result: Evaluation, what: str = "within limits") -> str:
    """Return the table of the largest loads, nothing if they were not searched."""
    if not result.saturation:
        return ""
    shares = sorted({share for loads in result.saturation.values() for share in loads})
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{loads[share]:.2f}</td>" for share in shares)
        + "</tr>"
        for name, loads in sorted(result.saturation.items(), key=lambda x: -x[1][shares[0]])
    )
    heads = "".join(f"<th>{100 * share:g} % {what}</th>" for share in shares)
    return f"<h3>Largest load</h3><table><tr><th>policy</th>{heads}</tr>{rows}</table>"


def _table(result: Evaluation, load: float) -> str:
    best = result.best_heuristic(load)
    rows = []
    for name, information in result.ranking(load):
        r = result.ratio(name, best, load)
        kind = "learned" if name in result.learned else information
        cells = "".join(
            f"<td>{k * result.mean(name, load, m):,.{d}f}</td>" for _, m, k, d in COLUMNS
        )
        p50 = result.decision_s[name][0] * 1e6
        rows.append(
            f'<tr class="{kind}"><td>{html.escape(name)}</td><td>{information}</td>{cells}'
            f"<td>{with_interval(r)}</td><td>{p50:,.0f}</td></tr>"
        )
    heads = "".join(f"<th>{h}</th>" for h, *_ in COLUMNS)
    return (
        f"<h3>Load {load:g}</h3><div class='scroll'><table><tr><th>policy</th><th>knows</th>"
        f"{heads}<th>ratio</th><th>µs/decision</th></tr>{''.join(rows)}</table></div>"
    )
