"""The tables of a validation, once, for terminal, Markdown and HTML."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.table import Table

from servegym.costs.uncertainty import EngineSpread
from servegym.validate.constants import PROPOSED, VARIANTS, Fit, LeftOut, Variants
from servegym.validate.coverage import Coverage
from servegym.validate.engine import EngineConstants
from servegym.validate.ranking import rankings
from servegym.validate.score import (
    DIMENSIONS,
    METRICS,
    STATISTICS,
    Aggregate,
    Comparison,
    RowScore,
    RunScore,
    Skipped,
    Validation,
    aggregate,
    aggregates,
    worst,
)

#: Heading, factor and digits of each metric.
UNITS = {
    "ttft_s": ("TTFT, ms", 1e3, 1),
    "tpot_s": ("TPOT, ms", 1e3, 2),
    "e2e_s": ("E2E, s", 1.0, 2),
    "makespan_s": ("makespan, s", 1.0, 1),
    "output_tokens_per_s": ("output tokens/s", 1.0, 0),
    "running": ("running requests", 1.0, 1),
    "waiting": ("waiting requests", 1.0, 1),
    "kv_cache_pct": ("KV use, %", 1.0, 1),
}
#: Engines and GPUs of the aim for published measurements.
REACH_FAMILIES = ("vllm", "vllm-sync", "vllm-v0", "sglang", "trtllm")
REACH_GPUS = ("A100-", "H100-", "H200-", "L40S", "B200-")
_VARIANT_HEADS = ("no constants", "of the family", "source left out", "GPU left out")
_CONSTANT_HEADS = ("family", "step, ms", "sequence, us", "dense factor", "request, ms")
_NAMES = {"tpot_s": "TPOT", "ttft_s": "TTFT", "output_tokens_per_s": "throughput", "e2e_s": "E2E"}


class TextTable(NamedTuple):
    """A table of strings; the first column is a label."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def rich(self) -> Table:
        """Lay the table out for a terminal."""
        table = Table(title=self.title, caption=self.note or None, box=box.SIMPLE_HEAD)
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="right" if i else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Write the table as Markdown."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.heads) + " |"]
        lines.append("| --- |" + " ---: |" * (len(self.heads) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def html(self) -> str:
        """Write the table as HTML."""
        heads = "".join(f"<th>{html.escape(head)}</th>" for head in self.heads)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return (
            f"<h3>{html.escape(self.title)}</h3><div class='scroll'><table><tr>{heads}</tr>"
            f"{rows}</table></div>{note}"
        )


def run_tables(result: Validation) -> list[TextTable]:
    """A summary of all replayed runs, and each in full."""
    if not result.runs:
        return []
    summary = TextTable(
        "Replayed runs: error of the simulator",
        ("run", "throughput", "TPOT mean", "TTFT mean", "TTFT p99", "E2E mean", "E2E p99", "costs"),
        [
            (
                score.run.name,
                _percent(score.figures["output_tokens_per_s", "whole"].error),
                *(
                    _percent(score.figures[place].error)
                    for place in (
                        ("tpot_s", "mean"),
                        ("ttft_s", "mean"),
                        ("ttft_s", "p99"),
                        ("e2e_s", "mean"),
                        ("e2e_s", "p99"),
                    )
                ),
                "extrapolated" if score.extrapolated else "validated",
            )
            for score in result.runs
        ],
        _constants_note(result),
    )
    return [summary, *(run_table(score) for score in result.runs)]


def run_table(score: RunScore) -> TextTable:
    """Every figure of one replayed run."""
    rows = []
    for metric in UNITS:
        for statistic in (*STATISTICS, "time mean", "whole"):
            figure = score.figures.get((metric, statistic))
            if figure is not None:
                rows.append((f"{UNITS[metric][0]}, {statistic}", *_cells(metric, figure)))
    run = score.run
    why = "; ".join(score.extrapolated) or "costs measured on this GPU"
    return TextTable(
        f"{run.name} ({run.engine}, {len(run.arrival_s)} requests)",
        ("figure", "measured", "simulated", "error"),
        rows,
        f"{why}. KV blocks: {score.replay.num_blocks} simulated, "
        f"{run.num_blocks or 'not'} logged. Preemptions simulated: {score.replay.num_preemptions}.",
    )


def published_tables(result: Validation) -> list[TextTable]:
    """Errors by source, GPU, model, engine; orders; the worst rows; what was left out."""
    if not (result.rows or result.skipped_rows):
        return []
    tables = [_dimension_table(result, "all rows", lambda score: "all")] if result.rows else []
    tables += [_dimension_table(result, f"by {name}", key) for name, key in DIMENSIONS.items()]
    return [*tables, ranking_table(result), worst_table(result), skipped_table(result)]


def _dimension_table(result: Validation, name: str, key: Callable[[RowScore], str]) -> TextTable:
    heads = (name.removeprefix("by "), "grade", "rows", *(_NAMES[m] for m in METRICS))
    rows = []
    for (place, grade), group in aggregates(result.rows, key).items():
        num_rows = max(x.num_rows for x in group.values())
        cells = (_aggregate_cell(group.get(metric)) for metric in METRICS)
        rows.append((place, grade, str(num_rows), *cells))
    return TextTable(
        f"Published measurements, error in % ({name})",
        heads,
        rows,
        "Median of the absolute error / its 90th percentile / median with sign (rows with that "
        "figure). " + _constants_note(result),
    )


def ranking_table(result: Validation) -> TextTable:
    """Kendall's tau by source."""
    return TextTable(
        "Order of configurations (Kendall's tau-b between simulated and measured)",
        ("source", "figure", "rows", "all rows", "same work", "pairs"),
        [
            (
                r.source,
                _NAMES[r.metric],
                str(r.num_rows),
                f"{r.tau:.2f}",
                f"{r.tau_same_work:.2f}" if r.tau_same_work == r.tau_same_work else "-",
                str(r.num_pairs),
            )
            for r in rankings(result.rows)
        ],
        "same work: pairs with the same model, lengths and load, which differ in GPU, degree, "
        "precision or engine.",
    )


def worst_table(result: Validation) -> TextTable:
    """The twenty rows farthest off, with a guess at why."""
    return TextTable(
        "The twenty worst rows",
        ("row", "source", "what", "figure", "measured", "simulated", "error", "guess"),
        [
            (
                score.row.row_id,
                f"{score.row.source} ({score.row.quality})",
                what(score),
                *_main_cells(score),
                score.guess,
            )
            for score in worst(result.rows)
        ],
    )


def skipped_table(result: Validation) -> TextTable:
    """Reasons for which rows were not simulated, with counts."""
    rows = _by_reason(result.skipped_rows)
    total = len(result.rows) + len(result.skipped_rows)
    return TextTable(
        f"Not simulated: {len(result.skipped_rows)} of {total} rows",
        ("reason", "rows", "sources"),
        [(reason, str(count), ", ".join(sources)) for reason, count, sources in rows],
        "Every row is listed with its reason in the JSON file.",
    )


def skipped_files_table(result: Validation) -> TextTable:
    """Files that are no run."""
    return TextTable(
        "Files left out",
        ("file", "reason"),
        [(skipped.name, skipped.reason) for skipped in result.skipped_files],
    )


def fit_table(fits: list[Fit]) -> TextTable:
    """Constants of every family, and their errors on sources and GPUs left out."""
    rows = [
        (
            fit.family,
            *constant_cells(fit.constants),
            str(fit.num_rows),
            f"{100 * fit.before:.1f}",
            f"{100 * fit.after:.1f}",
            _left_out_cell(fit.sources),
            _left_out_cell(fit.gpus),
        )
        for fit in fits
    ]
    return TextTable(
        "Fitted constants of engine families",
        (
            *_CONSTANT_HEADS,
            "rows",
            "error without, %",
            "with, %",
            "source left out: without -> with, %",
            "GPU left out: without -> with, %",
        ),
        rows,
        "Median absolute error of TPOT, or of throughput where no TPOT was published, rows of "
        "grade A and B. Left out: constants fitted on the other sources, or GPUs, only.",
    )


def reach_table(variants: Variants) -> TextTable:
    """Errors of engines on data-centre GPUs, by the constants they are replayed with."""
    groups = {
        "all": REACH_FAMILIES,
        "all but vllm-v0": tuple(name for name in REACH_FAMILIES if name != "vllm-v0"),
        **{name: (name,) for name in REACH_FAMILIES},
    }
    rows: list[tuple[str, ...]] = []
    for label, families in groups.items():
        for metric in ("tpot_s", "output_tokens_per_s"):
            errors = {
                variant: [
                    score.figures[metric].error
                    for score in scores
                    if metric in score.figures
                    and score.plan.family in families
                    and score.plan.setup.gpu.startswith(REACH_GPUS)
                ]
                for variant, scores in variants.items()
            }
            if errors["none"]:
                medians = (f"{100 * aggregate(errors[v]).median:.1f}" for v in VARIANTS)
                rows.append((label, _NAMES[metric], str(len(errors["none"])), *medians))
    return TextTable(
        "Median absolute error in % on A100, H100, H200, L40S and B200, grades A and B",
        ("engine", "figure", "rows", *_VARIANT_HEADS),
        rows,
        "No constants: the simulator as it is. Of the family: one set for each engine family, "
        "fitted on these rows and its others. Left out: fitted without the source, or the GPU, of "
        "the row; without constants if there is no other.",
    )


def coverage_table(found: Sequence[Coverage]) -> TextTable:
    """How many rows lie in their bands, by figure and engine family."""
    return TextTable(
        "Rows of grade A and B within their 90 % bands, in %",
        ("figure", "engine", "rows", "kernels alone", "whole band", "up to"),
        [
            (
                _NAMES[one.metric],
                one.family,
                str(one.num_rows),
                f"{100 * one.kernels:.0f}",
                f"{100 * one.whole:.0f}",
                f"x{one.width:.2f}",
            )
            for one in found
        ],
        "Kernels alone: how far held-out kernel tables let the figure be off. Whole band: with the "
        "spread of the engine family, of all sources but the row's. Up to: upper end of the whole "
        "band over the prediction, median.",
    )


def spread_table(spreads: Mapping[str, EngineSpread]) -> TextTable:
    """What no kernel explains, by engine family."""
    return TextTable(
        "Spread of engine families beside that of kernels",
        ("engine", "step", "TTFT"),
        [(name, f"{s.step:.2f}", f"{s.ttft:.2f}") for name, s in spreads.items()],
        "Standard deviations of logarithms, from the 90th percentile of all rows.",
    )


def _left_out_cell(groups: list[LeftOut]) -> str:
    known = [
        f"{group.name} {100 * group.before:.0f} -> {100 * group.after:.0f}"
        for group in groups
        if group.after is not None
    ]
    return ", ".join(known) or "only one"


def proposed_table() -> TextTable:
    """The constants that `--proposed` applies."""
    return TextTable(
        "Proposed constants, of those fitted the ones that hold on other sources",
        _CONSTANT_HEADS,
        [(family, *constant_cells(constants)) for family, constants in PROPOSED.items()],
    )


def constant_cells(constants: EngineConstants) -> tuple[str, str, str, str]:
    """Constants in print units."""
    return (
        f"{1e3 * constants.step_s:.1f}",
        f"{1e6 * constants.sequence_s:.0f}",
        f"{constants.dense_factor:.2f}",
        f"{1e3 * constants.request_s:.0f}",
    )


def what(score: RowScore) -> str:
    """Say in a few words what a row measured."""
    plan = score.plan
    load = {
        "closed": f"{plan.concurrency} clients",
        "batch": f"batch {plan.concurrency}",
        "open": f"{plan.rate_rps:g}/s",
        "offline": "offline",
    }[plan.loop]
    lengths = f"{plan.prompt_tokens:g}/{plan.output_tokens:g}"
    setup = plan.setup
    stages = f"{setup.pp} stages of " if setup.pp > 1 else ""
    gpus = f"{stages}{setup.tp} x {setup.gpu}"
    if plan.prefill is not None:
        first = plan.num_prefill * plan.prefill.tp * plan.prefill.expert_ranks
        gpus = f"{first} + {plan.num_workers * setup.tp * setup.expert_ranks} x {setup.gpu}"
    return f"{plan.family}, {setup.model} {setup.precision}, {gpus}, {lengths}, {load}"


def _main_cells(score: RowScore) -> tuple[str, str, str, str]:
    name = next(name for name, figure in score.figures.items() if figure is score.main)
    return (UNITS[name][0], *_cells(name, score.main))


def _cells(metric: str, figure: Comparison) -> tuple[str, str, str]:
    _, factor, digits = UNITS[metric]
    return (
        f"{factor * figure.measured:,.{digits}f}",
        f"{factor * figure.simulated:,.{digits}f}",
        _percent(figure.error),
    )


def _aggregate_cell(group: Aggregate | None) -> str:
    if group is None:
        return "-"
    median, p90, bias = 100 * group.median, 100 * group.p90, 100 * group.bias
    return f"{median:.1f} / {p90:.0f} / {bias:+.1f} ({group.num_rows})"


def _percent(error: float) -> str:
    return f"{100 * error:+.1f} %"


def _constants_note(result: Validation) -> str:
    if not result.constants:
        return "Simulator as it is, without constants of engine families."
    return "With the proposed constants of engine families."


def _by_reason(skipped: list[Skipped]) -> list[tuple[str, int, list[str]]]:
    counts = Counter(item.reason for item in skipped)
    return [
        (reason, count, sorted({item.source for item in skipped if item.reason == reason}))
        for reason, count in counts.most_common()
    ]
