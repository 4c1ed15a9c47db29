"""Drifted costs as files that the simulator and the router take, tested on a later part."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from servegym.assets.specs import gpu
from servegym.calibrate.calibration import Calibration, read_calibration
from servegym.calibrate.correction import Correction
from servegym.errors import ConfigError
from servegym.replay.compare import (
    Figure,
    compare,
    observed_latencies,
    predicted_latencies,
)
from servegym.replay.conditions import Observed
from servegym.replay.drift import Drift, Stretch, find_drift
from servegym.replay.fleet import Fleet, calibration_of, scenario_entry
from servegym.replay.forced import Factors, Forced
from servegym.replay.log import ReplayLog
from servegym.replay.terms import TERMS
from servegym.scenario import Scenario
from servegym.scenario.fleet import FleetEntry
from servegym.serve.facts import Hardware, Rates
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.replica import ReplicaConfig
from servegym.whole_files import write_whole

#: Share of the time that factors are fitted on before they are tested on the rest.
FIT_SHARE = 0.7


@dataclass(frozen=True)
class HeldOut:
    """Errors on the later part of a log, with costs as they were and fitted on the earlier part.

    Attributes:
        split_s: Where the later part begins, after the first dispatch.
        before: With the costs as they were.
        after: With those fitted on what had ended by then.
    """

    split_s: float
    before: list[Figure]
    after: list[Figure]


def held_out(log: ReplayLog, forced: Forced, observed: Observed, tolerance: float) -> HeldOut:
    """Fit on the earlier part of a log and compare on the later one.

    Raises:
        ConfigError: If either part is too short.
    """
    split_s = FIT_SHARE * forced.span_s
    known = observed.ended_by(split_s)
    later = observed.at_s >= split_s
    if known.usable.sum() < 50 or (later & observed.usable).sum() < 20:
        raise ConfigError(
            f"the log is too short to be fitted and tested: {int(known.usable.sum())} requests "
            f"end in its first {100 * FIT_SHARE:.0f} %, {int((later & observed.usable).sum())} "
            "come after; needed are 50 and 20"
        )
    [expected] = forced.play([Factors.ones(len(log.fleet.names))])
    drift = find_drift(forced, known, expected, tolerance=tolerance)
    factors = drift.factors()
    [corrected] = forced.play([factors])
    was = observed_latencies(log, forced, observed)
    extra_s = drift.fit.request_s(observed.at_s, observed.replica)
    before = predicted_latencies(log, forced, observed, expected, 0.0)
    after = predicted_latencies(log, forced, observed, corrected, extra_s)
    return HeldOut(
        split_s,
        compare(log, forced, was, before, later),
        compare(log, forced, was, after, later),
    )


def write_refit(log: ReplayLog, drift: Drift, folder: Path) -> list[Path]:
    """Write a calibration of each drifted replica, and the fleet that uses them.

    The fleet's file is `scenario.yaml` or `router.yaml`, as what the log was replayed with;
    replicas described by rates get new rates instead of a calibration.

    Args:
        log: The log.
        drift: What has become of its replicas.
        folder: Goes there; it is made if need be.

    Returns:
        The files.

    Raises:
        ConfigError: If no replica has drifted, or the folder cannot be written.
    """
    fleet = log.fleet
    drifted = {
        r: replica.now
        for r, replica in enumerate(drift.replicas)
        if replica.now is not None and replica.now.drifted
    }
    if not drifted:
        raise ConfigError("no replica has drifted from its cost model: there is nothing to refit")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise OSError
    except OSError:
        raise ConfigError(f"{folder} cannot be written: give a folder for the new costs") from None
    written: dict[int, Path] = {}
    for r, stretch in drifted.items():
        if not _has_rates(fleet, r):
            written[r] = folder / f"calibration-{_file_name(fleet.names[r])}.json"
            correction(fleet, r, stretch).write(written[r])
    if isinstance(fleet.origin, RouterConfig):
        data, name = _router(fleet.origin, written, drifted), "router.yaml"
    else:
        data, name = _scenario(fleet.origin, written), "scenario.yaml"
    path = folder / name
    write_whole({path: yaml.safe_dump(data, sort_keys=False).encode()})
    return [*written.values(), path]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _has_rates(fleet: Fleet, replica: int) -> bool:
    origin = fleet.origin
    return isinstance(origin, RouterConfig) and isinstance(origin.replicas[replica].facts, Rates)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def correction(fleet: Fleet, replica: int, stretch: Stretch) -> Calibration:
    """Make the calibration of a replica as a stretch of the log shows it."""
    origin = fleet.origin
    entry: Hardware | FleetEntry
    precision: str
    if isinstance(origin, RouterConfig):
        facts = origin.replicas[replica].facts
        assert isinstance(facts, Hardware)
        entry, model, precision = facts, facts.model, facts.precision
    else:
        entry = scenario_entry(origin, replica)
        model, precision = origin.model, origin.precision
    step, kv, prefill = (stretch.terms[term].value for term in TERMS)
    base, sheet, costs, fp8 = None, None, "fits", precision != "bf16"
    if isinstance(entry, FleetEntry) and entry.costs:
        costs = entry.costs
    before = calibration_of(fleet, replica)
    if before is not None:
        found = read_calibration(before)
        base, sheet = found.content, found.datasheet
        if isinstance(base, Correction):  # of a correction, the product is kept
            step, kv, prefill = step * base.step, kv * base.kv, prefill * base.prefill
            costs, base = base.costs, base.base
    content = Correction(
        step=_rounded(step),
        kv=_rounded(kv),
        prefill=_rounded(prefill),
        fp8=fp8,
        costs=costs,
        num_requests=stretch.num_requests,
        base=base,
    )
    if sheet is None:
        gpu(entry.gpu)  # refuse an unknown name before the file is there
    return Calibration(gpu=entry.gpu, datasheet=sheet, model=model, tp=entry.tp, content=content)


def _scenario(scenario: Scenario, written: dict[int, Path]) -> dict[str, Any]:
    """Give each corrected replica a fleet entry of its own, in the same order."""
    data: dict[str, Any] = scenario.model_dump(mode="json", exclude_unset=True)
    entries: list[dict[str, Any]] = []
    replica = 0
    for entry in data["fleet"]:
        for _ in range(entry.get("count", 1)):
            one = {key: value for key, value in entry.items() if key != "count"}
            if replica in written:
                one.pop("costs", None)
                entries.append({**one, "calibration": str(written[replica].resolve())})
            elif entries and {**entries[-1], "count": 1} == {**one, "count": 1}:
                entries[-1]["count"] = entries[-1].get("count", 1) + 1
            else:
                entries.append(one)
            replica += 1
    return {**data, "fleet": entries}


def _router(
    config: RouterConfig, written: dict[int, Path], drifted: dict[int, Stretch]
) -> dict[str, Any]:
    data: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    for r, replica in enumerate(data["replicas"]):
        if r in written:
            replica["hardware"]["calibration"] = str(written[r].resolve())
        elif r in drifted:
            replica["rates"] = _rates(config.replicas[r], drifted[r])
    return data


def _rates(replica: ReplicaConfig, stretch: Stretch) -> dict[str, Any]:
    """Change the rates of a replica as the terms of its grid have changed."""
    facts = replica.facts
    assert isinstance(facts, Rates)
    step, kv, prefill = (stretch.terms[term].value for term in TERMS)
    budget = float(facts.max_num_batched_tokens)
    step_s = max(0.0, facts.decode_step_s - facts.decode_seq_s)
    work_s = max(0.0, budget / facts.prefill_tokens_per_s - step_s)
    token_s = work_s / budget
    kv_s = max(0.0, facts.decode_seq_s - token_s)  # of a sequence of 1,024 tokens
    seq_s = kv * kv_s + prefill * min(token_s, facts.decode_seq_s)
    new_step_s = step * (step_s + token_s) - prefill * token_s
    return {
        **facts.model_dump(mode="json", exclude_unset=True),
        "prefill_tokens_per_s": _rounded(budget / (new_step_s + prefill * work_s)),
        "decode_step_s": _rounded(new_step_s + seq_s),
        "decode_seq_s": _rounded(seq_s),
    }
