"""Entries of a leaderboard: policies judged on a suite, as files and as one page."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

import servegym
from servegym.drawing import PALETTE, as_image, pyplot
from servegym.errors import ConfigError
from servegym.evaluate.compare import with_interval
from servegym.evaluate.report import STYLE
from servegym.evaluate.suite import (
    CONTROL_TOLERANCE,
    LEAST_SCORE,
    Progress,
    Score,
    Suite,
    SuiteScenario,
    play,
    playable,
    reference,
)
from servegym.export.shipped import shipped_path
from servegym.whole_files import write_whole

SCHEMA = "servegym-leaderboard-entry-1"
#: Folder beside a suite, of entries that come with it.
ENTRIES = "entries"


def make_entry(
    suite: Suite,
    record: dict[str, Any],
    name: str,
    texts: Sequence[str],
    *,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Play the test split of every scenario that one of some policies can play.

    Args:
        suite: What is played.
        record: What was recorded of it.
        name: Of the entry.
        texts: Policies, as `evaluate.tune.resolve` takes them; each scenario is played by the first
            that can.
        progress: Called with what is done.

    Returns:
        The entry as plain data; see docs/leaderboard.md.

    Raises:
        ConfigError: If a policy can play none.
        ServeGymError: If the only policy named is none, or no valid file.
    """
    chosen = _choose(suite, texts)
    scenarios: dict[str, dict[str, Any]] = {}
    for scenario in suite.scenarios:
        if scenario.name not in chosen:
            continue
        text = chosen[scenario.name]
        scenarios[scenario.name] = {}
        for load in scenario.loads:
            there = reference(suite, record, scenario, load)
            row = play(suite, scenario, load, [text], progress=progress)[text]
            scenarios[scenario.name][f"{load:g}"] = {
                **row,
                **_score_numbers(there.score(np.array(row["values"]))),
                "metric": there.objective.metric,
                "reference": there.best,
                "seeds": suite.seeds,
            }
    return _entry(suite, name, texts, scenarios)


def recorded_rules(record: dict[str, Any]) -> list[str]:
    """Rules that were recorded of any scenario, each once."""
    texts = (
        text
        for loads in record["scenarios"].values()
        for found in loads.values()
        for text in found["rules"]
    )
    return list(dict.fromkeys(texts))


def recorded_entries(suite: Suite, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Make an entry of each rule that was recorded; nothing is played."""
    entries = []
    played = [(scenario, load) for scenario in suite.scenarios for load in scenario.loads]
    references = [reference(suite, record, scenario, load) for scenario, load in played]
    for text in recorded_rules(record):
        scenarios: dict[str, dict[str, Any]] = {}
        for (scenario, load), there in zip(played, references, strict=True):
            row = record["scenarios"][scenario.name][f"{load:g}"]["rules"].get(text)
            if row is not None:
                scenarios.setdefault(scenario.name, {})[f"{load:g}"] = {
                    **{key: value for key, value in row.items() if key != "recorded_by"},
                    **_score_numbers(there.score(np.array(row["values"]))),
                    "metric": there.objective.metric,
                    "reference": there.best,
                    "seeds": suite.seeds,
                }
        entries.append(_entry(suite, text, [text], scenarios))
    return entries


def read_entries(suite: Suite, folder: Path) -> list[dict[str, Any]]:
    """Read the entries of a suite that lie in a folder.

    Raises:
        ConfigError: If a file is none, or of another suite.
    """
    entries = []
    for path in sorted(folder.glob("*.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path} is no entry of a leaderboard: {error}") from error
        if not isinstance(entry, dict) or entry.get("schema") != SCHEMA:
            raise ConfigError(f'{path} is no entry of a leaderboard: its schema must be "{SCHEMA}"')
        if entry["suite"] != suite.name:
            raise ConfigError(
                f"{path} is an entry of {entry['suite']}: keep those of {suite.name} in a folder"
                " of their own"
            )
        entries.append(entry)
    return entries


def write_entry(entry: dict[str, Any], folder: Path) -> Path:
    """Write an entry to a file named for it, over one of the same name."""
    words = re.sub(r"[^a-z0-9.]+", "-", entry["name"].lower()).strip("-.")
    path = folder / f"{words}.json"
    text = json.dumps(entry, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_whole({path: text.encode()})
    return path


def total(suite: Suite, entry: dict[str, Any]) -> float:
    """Mean share of the headroom over all scenarios but the controls.

    One that is not played counts as 0, as if the best tuned rule had played it; none counts less
    than `LEAST_SCORE`.
    """
    shares = [
        max(LEAST_SCORE, share) if (share := _share(entry, s)) is not None else 0.0
        for s in suite.scenarios
        if not s.is_control
    ]
    return float(np.mean(shares))


def ranked(suite: Suite, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the entries in order: the highest total first, those that play less than half behind.

    What is not played counts as 0, which most of what is played falls short of.
    """

    def key(entry: dict[str, Any]) -> tuple[bool, float]:
        return 2 * len(entry["scenarios"]) < len(suite.scenarios), -total(suite, entry)

    return sorted(entries, key=key)


def leaderboard_table(suite: Suite, entries: Sequence[dict[str, Any]]) -> Table:
    """Tabulate entries for a terminal."""
    table = Table(
        title=suite.name,
        caption="share of the headroom in %: 0 is the best tuned rule, 100 the clairvoyant search;"
        " controls: ratio to the best tuned rule",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    table.add_column("entry", overflow="fold", max_width=28)
    for head in ("total", *(scenario.name for scenario in suite.scenarios)):
        table.add_column(head, justify="right", no_wrap=True)
    for entry in ranked(suite, entries):
        cells = [_short_cell(entry, scenario) for scenario in suite.scenarios]
        table.add_row(entry["name"], f"{100 * total(suite, entry):z.0f}", *cells)
    return table


def leaderboard_page(
    suite: Suite, record: dict[str, Any], entries: Sequence[dict[str, Any]]
) -> str:
    """Return the page's HTML; it needs nothing but itself.

    Args:
        suite: What was played.
        record: What was recorded of it.
        entries: All that are shown; those of rules that were recorded are dimmed.
    """
    order = ranked(suite, entries)
    known = set(recorded_rules(record))
    heads = ["entry", "policies", "total", "played", *(s.name for s in suite.scenarios)]
    rows = ""
    for entry in order:
        played = sum(s.name in entry["scenarios"] for s in suite.scenarios)
        cells = [
            entry["name"],
            ", ".join(p["policy"] for p in entry["policies"]),
            f"{100 * total(suite, entry):z.0f}",
            f"{played} of {len(suite.scenarios)}",
            *(_cell(entry, s) for s in suite.scenarios),
        ]
        kind = "oracle" if entry["name"] in known else "learned"
        rows += _row(cells, kind=kind)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>servegym: {html.escape(suite.name)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(suite.name)}</h1>
<p>{html.escape(suite.description)}</p>
<h2>Entries</h2><div class="scroll"><table>{_row(heads, "th")}{rows}</table></div>
<p class="note">Share of the headroom in per cent, with its 95 % bootstrap interval over
{suite.num_test_seeds} test seeds: 0 is the best tuned rule, 100 what an offline search reached that
knows the future; knowing it brings at least so much. Of controls, where there is next to nothing to
gain, the ratio to the best tuned rule. The total is the mean over all scenarios but the controls;
one that is not played counts as 0, none counts less than {100 * LEAST_SCORE:.0f}. Who plays less
than half of the scenarios stands behind the others. Rules that come with the suite are dimmed.</p>
{_totals_figure(suite, order, known)}
<h2>Scenarios</h2><div class="scroll"><table>{_scenario_rows(suite, record)}</table></div>
<p class="note">All workloads are generated, some fitted to a public trace: the splits are disjoint
seeds. Training: below 500,000; validation: from there on; test: from 9,000,000 on.</p>
<p class="note">servegym {servegym.__version__}</p>
</body></html>
"""


def write_page(
    suite: Suite, record: dict[str, Any], entries: Sequence[dict[str, Any]], path: Path
) -> None:
    """Write the page."""
    write_whole({path: leaderboard_page(suite, record, entries).encode()})


def _choose(suite: Suite, texts: Sequence[str]) -> dict[str, str]:
    """Give each scenario the first policy that can play it."""
    chosen: dict[str, str] = {}
    for text in texts:
        errors = []
        for scenario in suite.scenarios:
            error = playable(*suite.pose(scenario), text)
            if error is None:
                chosen.setdefault(scenario.name, text)
            else:
                errors.append(error)
        if len(errors) == len(suite.scenarios):
            raise errors[0]
        if text not in chosen.values():
            raise ConfigError(f"{text} plays nothing that those named before it do not play")
    return chosen


def _entry(
    suite: Suite, name: str, texts: Sequence[str], scenarios: dict[str, Any]
) -> dict[str, Any]:
    policies = []
    for text in texts:
        shipped = shipped_path(text)
        path = shipped or Path(text)
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        shown = path.name if digest and not shipped else text
        policies.append({"policy": shown, "sha256": digest})
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "name": name,
        "policies": policies,
        "servegym_version": servegym.__version__,
        "scenarios": scenarios,
    }


def _score_numbers(score: Score) -> dict[str, Any]:
    def numbers(found: Any) -> dict[str, Any]:
        bounds = [_finite(found.low), _finite(found.high)]
        return {"value": _finite(found.value), "ci95": bounds, "num_pairs": found.num_pairs}

    return {"mean": score.mean, "headroom": numbers(score.share), "ratio": numbers(score.ratio)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _share(entry: dict[str, Any], scenario: SuiteScenario) -> float | None:
    """Mean share over the loads of a scenario, `None` if it was not played or has no headroom."""
    loads = entry["scenarios"].get(scenario.name, {}).values()
    shares = [row["headroom"]["value"] for row in loads]
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def _ratio(entry: dict[str, Any], scenario: SuiteScenario) -> float:
    rows = entry["scenarios"][scenario.name].values()
    return float(np.mean([row["ratio"]["value"] for row in rows]))


def _short_cell(entry: dict[str, Any], scenario: SuiteScenario) -> str:
    if scenario.name not in entry["scenarios"]:
        return "-"
    if scenario.is_control:
        return f"{_ratio(entry, scenario):.3f}"
    share = _share(entry, scenario)
    return "-" if share is None else f"{100 * share:z.0f}"


def _cell(entry: dict[str, Any], scenario: SuiteScenario) -> str:
    """A cell of the page: with intervals, load by load."""
    parts = []
    for load, row in entry["scenarios"].get(scenario.name, {}).items():
        found = row["ratio"] if scenario.is_control else row["headroom"]
        if found["value"] is None:
            continue
        form, factor = (".3f", 1.0) if scenario.is_control else (".0f", 100.0)
        text = f"{factor * found['value']:{form}}"
        low, high = found["ci95"]
        if low is not None:
            text += f" [{factor * low:{form}}, {factor * high:{form}}]"
        if scenario.is_control and low is not None and low > 1.0 + CONTROL_TOLERANCE:
            text += " worse"
        parts.append(text if len(scenario.loads) == 1 else f"load {load}: {text}")
    return "; ".join(parts) or "-"


def _row(cells: Sequence[str], tag: str = "td", kind: str = "") -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f'<tr class="{kind}">{inner}</tr>'


def _totals_figure(suite: Suite, order: Sequence[dict[str, Any]], known: set[str]) -> str:
    plt = pyplot()
    shown = list(reversed(order))
    figure, axis = plt.subplots(figsize=(8, 0.28 * len(shown) + 1.2))
    colors = [PALETTE[0] if entry["name"] in known else PALETTE[1] for entry in shown]
    axis.barh(
        [entry["name"] for entry in shown],
        [100 * total(suite, entry) for entry in shown],
        color=colors,
    )
    axis.axvline(0.0, color="gray", linewidth=1)
    axis.set(xlabel="mean share of the headroom, %")
    return as_image(figure, "Total of every entry")


def _scenario_rows(suite: Suite, record: dict[str, Any]) -> str:
    heads = ["scenario", "what it stands for", "problem", "load", "episodes", "metric"]
    rows = _row([*heads, "best tuned rule", "its mean", "clairvoyant", "over the rule"], "th")
    for scenario in suite.scenarios:
        problem, _ = suite.pose(scenario)
        for load in scenario.loads:
            there = reference(suite, record, scenario, load)
            policy = record["scenarios"][scenario.name][f"{load:g}"]["rules"][there.best]["policy"]
            rows += _row(
                [
                    scenario.name,
                    scenario.regime,
                    problem.name,
                    f"{load:g}",
                    f"{suite.num_test_seeds} of {scenario.num_units:,} {problem.unit}",
                    there.objective.label,
                    policy,
                    f"{there.rule_values.mean():.3f}",
                    f"{there.bound_values.mean():.3f}",
                    with_interval(there.score(there.bound_values).ratio),
                ]
            )
    return rows
