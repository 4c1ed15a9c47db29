#!/usr/bin/env python3
"""Write the result tables from a folder of evaluations, as EXPERIMENTS.md says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    ("TTFT mean ms", "ttft_mean_s", 1e3, 0),
    ("p99", "ttft_p99_s", 1e3, 0),
    ("TPOT mean ms", "tpot_mean_s", 1e3, 1),
    ("E2E mean s", "e2e_mean_s", 1, 2),
    ("p99", "e2e_p99_s", 1, 1),
    ("SLO %", "slo_attainment", 100, 1),
    ("hit %", "prefix_hit_rate", 100, 0),
)
ORDER_COLUMNS = (
    ("TTFT mean s", "ttft_mean_s", 1, 2),
    ("p99", "ttft_p99_s", 1, 0),
    ("mean E2E s", "e2e_mean_s", 1, 2),
    ("p99", "e2e_p99_s", 1, 0),
    ("within limits %", "slo_attainment", 100, 1),
    ("preempted", "preemptions", 1, 0),
)
#: Scenarios of one engine, whose tables are on a page of their own.
ORDER_SCENARIOS = ("kv-starved", "slo-tiers", "long-tailed")


def comparison(document: dict[str, Any], load: float) -> str:
    """Tabulate one load of an evaluation, best first by what it was judged by."""
    rows = [a for a in document["aggregates"] if a["load"] == load]
    judged = rows[0]["ratio"].get("metric", "e2e_mean_s")
    rows.sort(key=lambda a: a["metrics"][judged], reverse=judged == "goodput_rps")
    name = "goodput" if judged == "goodput_rps" else "E2E"
    heads = ["policy", "knows", *(h for h, *_ in COLUMNS), f"{name} ratio [95 % CI]"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for a in rows:
        cells = [f"{k * a['metrics'][m]:,.{d}f}" for _, m, k, d in COLUMNS]
        ratio = a["ratio"]
        low, high = ratio["ci95"]
        spread = f"{ratio['value']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(
            "| " + " | ".join([f"`{a['policy']}`", a["information"], *cells, spread]) + " |"
        )
    return "\n".join(lines)


def orders(document: dict[str, Any]) -> str:
    """Tabulate orders inside one engine at load 1, with the ratios of all loads."""
    rows = {(a["policy"], a["load"]): a for a in document["aggregates"]}
    at_one = [a for a in document["aggregates"] if a["load"] == 1.0]
    judged = at_one[0]["ratio"]["metric"]
    at_one.sort(key=lambda a: a["metrics"][judged], reverse=judged == "goodput_rps")
    name = "goodput" if judged == "goodput_rps" else "E2E"
    loads = document["loads"]
    heads = ["order", "knows", *(h for h, *_ in ORDER_COLUMNS)]
    heads += [f"{name} ratio at {load:g}" for load in loads]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for a in at_one:
        learned = a["policy"].startswith("learned-")
        cells = ["**learned**" if learned else f"`{a['policy']}`", a["information"]]
        cells += [f"{k * a['metrics'][m]:,.{d}f}" for _, m, k, d in ORDER_COLUMNS]
        for load in loads:
            ratio = rows[a["policy"], load]["ratio"]
            low, high = ratio["ci95"]
            cells.append(f"{ratio['value']:.3f} [{low:.3f}, {high:.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speeds(bench: dict[str, Any]) -> str:
    """Tabulate `servegym bench`."""
    rows = []
    for key, value in bench.items():
        if not isinstance(value, dict):
            rows.append((key, {"median": value, "min": value, "max": value}))
        elif "median" in value:
            rows.append((key, value))
        else:
            rows += [(f"{key}, {size} replicas", v) for size, v in value.items()]
    lines = ["| what | median | least | most |", "|---|---:|---:|---:|"]
    for name, spread in rows:
        values = [spread[k] for k in ("median", "min", "max")]
        cells = " | ".join(f"{v:,.3g}" if v < 100 else f"{v:,.0f}" for v in values)
        lines.append(f"| `{name}` | {cells} |")
    return "\n".join(lines)


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(page):
        sys.exit(f"{path} has no place for {name}")
    path.write_text(pattern.sub(lambda m: m[1] + text + "\n" + m[2], page))


def main() -> None:
    """Write all tables whose evaluation is there."""
    folder = Path(sys.argv[1])
    results = ROOT / "docs" / "results.md"
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if path.stem == "bench":
            insert(results, "bench", speeds(document))
            continue
        if path.stem in ORDER_SCENARIOS:
            insert(ROOT / "docs" / "preemption.md", path.stem, orders(document))
            print(f"{path.stem}: {len(document['seeds'])} seeds, loads {document['loads']}")
            continue
        for load in document["loads"]:
            insert(results, f"{path.stem} {load:g}", comparison(document, load))
        if path.stem == "mixed":
            table = comparison(document, 1.0)
            insert(
                ROOT / "README.md", "results", re.sub(r"`([\w-]+):[^`]*`", r"`\1`, tuned", table)
            )
        print(f"{path.stem}: {len(document['seeds'])} seeds, loads {document['loads']}")


if __name__ == "__main__":
    main()
