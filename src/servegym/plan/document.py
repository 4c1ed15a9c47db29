"""An answer as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import servegym
from servegym.documents import without_nan
from servegym.plan.answer import Answer, Candidate
from servegym.plan.tables import verdict
from servegym.whole_files import write_whole


def answer_document(result: Answer) -> dict[str, Any]:
    """Return everything that was found as plain data."""
    document = {
        "schema": "servegym-plan-1",
        "servegym_version": servegym.__version__,
        "command": " ".join(sys.argv[1:]),
        "question": result.question.model_dump(mode="json"),
        "prices": {name: price.model_dump() for name, price in result.prices.items()},
        "num_requests": result.num_requests,
        "num_trials": result.num_trials,
        "seconds": dict(result.seconds),
        "verdict": verdict(result),
        "options": [
            {"name": o.name, "usd_per_h": o.usd_per_h, "costs": o.status} for o in result.options
        ],
        "left_out": [one._asdict() for one in result.left_out],
        "best": _candidate(result, result.best) if result.best is not None else None,
        "safe": _candidate(result, result.safe) if result.safe is not None else None,
        "others": [_candidate(result, one) for one in result.others],
        "shown": [_candidate(result, one) for one in result.shown],
        "frontier": [_candidate(result, one) for one in result.frontier],
    }
    cleaned: dict[str, Any] = without_nan(document)
    return cleaned


def write_json(result: Answer, path: Path) -> None:
    """Write the answer to a file."""
    text = json.dumps(answer_document(result), indent=1, sort_keys=True) + "\n"
    write_whole({path: text.encode()})


def _candidate(result: Answer, one: Candidate) -> dict[str, Any]:
    trial = one.trial
    counts = zip(result.options, trial.fleet, strict=True)
    return {
        "fleet": [
            {
                "gpu": o.entry.gpu,
                "tp": o.entry.tp,
                "pipeline_parallel_size": o.entry.pipeline_parallel_size,
                "num_speculative_tokens": o.replica.num_drafts,
                "count": n,
            }
            for o, n in counts
            if n
        ],
        "name": one.name,
        "rule": trial.rule,
        "usd_per_h": one.usd_per_h,
        "attainment": trial.attainment,
        "late_first": trial.late_first,
        "slow": trial.slow,
        "late": trial.late,
        "ttft_s": trial.ttft_s,
        "tpot_s": trial.tpot_s,
        "why": one.why,
        "worlds": one.certainty._asdict() if one.certainty is not None else None,
    }
