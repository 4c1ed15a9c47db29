"""A replay as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import servegym
from servegym.documents import without_nan
from servegym.replay.compare import Figure
from servegym.replay.drift import Effect, ReplicaDrift
from servegym.replay.result import Replayed
from servegym.replay.sentences import identifiability, sentence
from servegym.whole_files import write_whole


def write_json(result: Replayed, path: Path) -> None:
    """Write all that a replay found as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(replay_document(result)), indent=1, allow_nan=False)
    write_whole({path: (text + "\n").encode()})


def replay_document(result: Replayed) -> dict[str, Any]:
    """Return everything that was found as plain data."""
    log, tested = result.log, result.held_out
    return {
        "schema": "servegym-replay-1",
        "servegym_version": servegym.__version__,
        "command": sys.argv,
        "files": list(log.files),
        "counts": {
            **log.counts(),
            "too_large": result.forced.num_unfit,
            "simulated": len(result.forced),
        },
        "first_bad_row": log.first_bad or None,
        "decisions": {
            "all": log.num_decisions,
            "by_fallback": log.num_fallbacks,
            "policies": log.deciders,
        },
        "span_s": result.forced.span_s,
        "notes": list(log.fleet.notes),
        "cached_share": None
        if result.cached is None
        else {"reported": result.cached[0], "simulated": result.cached[1]},
        "simulated_preemptions": result.num_preemptions,
        "figures": [_figure(one) for one in result.figures],
        "corrected_figures": [_figure(one) for one in result.corrected_figures],
        "tolerance": result.drift.tolerance,
        "drift": [_replica(one) for one in result.drift.replicas],
        "arrivals": {
            "loop": result.arrivals.loop,
            "requests": len(result.arrivals.rows),
            "waiting": result.arrivals.table.num_waiting,
            "without_predecessor": result.arrivals.table.num_cut,
        },
        "counterfactuals": [
            {
                "policy": one.policy,
                "decided": one.decided,
                "observed": False,
                "statistics": {f"{m}_{s}": value for (m, s), value in one.statistics.items()},
                "slo_attainment": one.slo_attainment,
                "agreement": one.agreement,
                "e2e_mean_ratio": one.ratio._asdict(),
                "arrival_shift_s": {
                    "mean": float(one.shift_s.mean()),
                    "least": float(one.shift_s.min()),
                    "most": float(one.shift_s.max()),
                },
            }
            for one in result.counterfactuals
        ],
        "unknown_policies": result.unknown_policies,
        "held_out": None
        if tested is None
        else {
            "split_s": tested.split_s,
            "before": [_figure(one) for one in tested.before],
            "after": [_figure(one) for one in tested.after],
        },
    }


def _figure(one: Figure) -> dict[str, Any]:
    return {**one._asdict(), "error": one.error}


def _effect(one: Effect) -> dict[str, Any]:
    return one._asdict()


def _replica(one: ReplicaDrift) -> dict[str, Any]:
    windows = one.windows
    return {
        "replica": one.name,
        "verdict": sentence(one),
        "num_requests": one.num_requests,
        "stretches": [
            {
                "begin_s": stretch.begin_s,
                "end_s": stretch.end_s,
                "num_requests": stretch.num_requests,
                "decode": _effect(stretch.decode),
                "terms": {name: _effect(term) for name, term in stretch.terms.items()},
                "step_kv_correlation": stretch.correlation,
                "identifiability": identifiability(stretch) or None,
                "typical_batch": stretch.batch,
                "typical_kv_tokens": stretch.kv_tokens,
            }
            for stretch in one.stretches
        ],
        "windows": None
        if windows is None
        else {
            "middle_s": windows.middle_s.tolist(),
            "decode": windows.values[:, 0].tolist(),
            "decode_low": windows.low[:, 0].tolist(),
            "decode_high": windows.high[:, 0].tolist(),
            "prefill": windows.values[:, 1].tolist(),
            "prefill_low": windows.low[:, 1].tolist(),
            "prefill_high": windows.high[:, 1].tolist(),
            "num_requests": windows.num_requests.tolist(),
        },
    }
