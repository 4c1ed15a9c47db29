"""The comparison as JSON; the schema is described in docs/evaluation.md."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import servegym
from servegym.documents import without_nan
from servegym.evaluate.compare import Difference, Ratio, Share
from servegym.evaluate.harness import CLAIRVOYANT, Evaluation
from servegym.whole_files import write_whole


def evaluation_document(result: Evaluation) -> dict[str, Any]:
    """Return the comparison as plain data; NaN becomes null."""
    text = result.scenario.model_dump_json()
    aggregates = []
    for load in result.loads:
        best = result.best_heuristic(load)
        judged = {"metric": result.objective.metric, "reference": best}
        for name, information in result.policies:
            keys = next(x.metrics for x in result.runs if x.policy == name and x.load == load)
            aggregates.append(
                {
                    "policy": name,
                    "information": information,
                    "load": load,
                    "metrics": {k: result.mean(name, load, k) for k in keys},
                    "ratio": {**judged, **_numbers(result.ratio(name, best, load))},
                    "headroom": _headroom(result, name, load),
                    "difference": {**judged, **_numbers(result.difference(name, best, load))},
                }
            )
    document = {
        "schema": "servegym-evaluation-1",
        "servegym_version": servegym.__version__,
        "command": " ".join(sys.argv[1:]),
        "problem": result.problem.name,
        "scenario": json.loads(text),
        "scenario_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "loads": result.loads,
        "seeds": result.seeds,
        "seeds_asked": result.seeds_asked,
        "notes": result.notes,
        "bound": _bound(result),
        "trace": result.trace.counts() if result.trace else None,
        "decision_s": {k: {"p50": a, "p99": b} for k, (a, b) in result.decision_s.items()},
        "aggregates": aggregates,
        "saturation_load": {
            name: {f"{share:g}": load for share, load in loads.items()}
            for name, loads in result.saturation.items()
        },
        "uncertainty": result.stability.document() if result.stability else None,
        "runs": [
            {"policy": r.policy, "load": r.load, "seed": r.seed, "metrics": r.metrics}
            for r in result.runs
        ],
    }
    cleaned: dict[str, Any] = without_nan(document)
    return cleaned


def write_json(result: Evaluation, path: Path) -> None:
    """Write the comparison to a file."""
    text = json.dumps(evaluation_document(result), indent=1, sort_keys=True) + "\n"
    write_whole({path: text.encode()})


def _bound(result: Evaluation) -> dict[str, Any] | None:
    if result.bound_budget <= 0:
        return None
    return {"policy": CLAIRVOYANT, "budget_episodes": result.bound_budget}


def _headroom(result: Evaluation, name: str, load: float) -> dict[str, Any] | None:
    if result.bound_budget <= 0:
        return None
    judged = {"metric": result.objective.metric, "reference": result.best_heuristic(load)}
    return {**judged, "bound": CLAIRVOYANT, **_numbers(result.headroom(name, load))}


def _numbers(found: Ratio | Difference | Share) -> dict[str, Any]:
    """A comparison with the bounds of its interval, which a single pair does not have."""
    bounds = [found.low, found.high] if found.num_pairs > 1 else [None, None]
    return {"value": found.value, "ci95": bounds, "num_pairs": found.num_pairs}
