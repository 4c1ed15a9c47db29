"""A validation as JSON, and its tables inside a Markdown document."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import servegym
from servegym.documents import without_nan
from servegym.validate.ranking import rankings
from servegym.validate.score import (
    DIMENSIONS,
    Comparison,
    RowScore,
    RunScore,
    Skipped,
    Validation,
    aggregates,
    worst,
)
from servegym.validate.tables import TextTable, what
from servegym.whole_files import write_whole


def validation_document(result: Validation) -> dict[str, Any]:
    """Return everything that was scored as plain data; NaN becomes null."""
    document = {
        "schema": "servegym-validation-1",
        "servegym_version": servegym.__version__,
        "command": " ".join(sys.argv[1:]),
        "engine_constants": {
            family: constants.__dict__ for family, constants in result.constants.items()
        },
        "runs": [_run(score) for score in result.runs],
        "rows": [_row(score) for score in result.rows],
        "aggregates": {
            dimension: [
                {
                    dimension: place,
                    "grade": grade,
                    "errors": {name: x._asdict() for name, x in group.items()},
                }
                for (place, grade), group in aggregates(result.rows, key).items()
            ]
            for dimension, key in {"all": lambda score: "all", **DIMENSIONS}.items()
        },
        "rankings": [ranking._asdict() for ranking in rankings(result.rows)],
        "worst_rows": [score.row.row_id for score in worst(result.rows)],
        "skipped_files": [_skipped(item) for item in result.skipped_files],
        "skipped_rows": [_skipped(item) for item in result.skipped_rows],
        "counts": {
            "runs": len(result.runs),
            "rows": len(result.rows),
            "skipped_files": len(result.skipped_files),
            "skipped_rows": len(result.skipped_rows),
        },
    }
    cleaned: dict[str, Any] = without_nan(document)
    return cleaned


def write_json(result: Validation, path: Path) -> None:
    """Write a validation to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: (json.dumps(validation_document(result), indent=1) + "\n").encode()})


def write_markdown(name: str, tables: list[TextTable], path: Path) -> None:
    """Write tables between the marks of that name in a document.

    Args:
        name: The marks are `<!-- name: begin -->` and `<!-- name: end -->`.
        tables: What goes between them.
        path: A document with the marks, which keeps the rest of its text; else a section is
            added at its end, or a document begun.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    section = "\n".join([begin, "", *(table.markdown() for table in tables), end])
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if begin in text and end in text:
        before, after = text.split(begin, 1)[0], text.split(end, 1)[1]
        text = before + section + after
    else:
        text = (text.rstrip() + "\n\n" if text else "") + section + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: text.encode()})


def _run(score: RunScore) -> dict[str, Any]:
    run = score.run
    return {
        "name": run.name,
        "engine": run.engine,
        "setup": asdict(score.setup),
        "num_requests": len(run.arrival_s),
        "validated": not score.extrapolated,
        "extrapolated_because": score.extrapolated,
        "preemptions_simulated": score.replay.num_preemptions,
        "num_blocks_simulated": score.replay.num_blocks,
        "figures": [
            {"metric": metric, "statistic": statistic, **_figure(figure)}
            for (metric, statistic), figure in score.figures.items()
        ],
        "series": {
            name: {"measured": run.series[name].tolist(), "simulated": values.tolist()}
            for name, values in score.series.items()
            if name in run.series
        },
    }


def _row(score: RowScore) -> dict[str, Any]:
    row, plan = score.row, score.plan
    return {
        "row_id": row.row_id,
        "source": row.source,
        "grade": row.quality,
        "what": what(score),
        "family": plan.family,
        "load": plan.loop,
        "setup": asdict(plan.setup),
        "workers": plan.num_workers,
        "prefill_setup": asdict(plan.prefill) if plan.prefill else None,
        "prefill_workers": plan.num_prefill,
        "validated": not score.extrapolated,
        "extrapolated_because": score.extrapolated,
        "figures": {name: _figure(figure) for name, figure in score.figures.items()},
        "guess": score.guess,
    }


def _figure(figure: Comparison) -> dict[str, float]:
    return {
        "measured": figure.measured,
        "simulated": figure.simulated,
        "error": figure.error,
    }


def _skipped(item: Skipped) -> dict[str, str]:
    return item._asdict()
