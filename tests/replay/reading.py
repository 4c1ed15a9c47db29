"""From a log's folder to what is found in it."""

from __future__ import annotations

from pathlib import Path

from servegym.replay.conditions import Observed
from servegym.replay.drift import Drift, find_drift
from servegym.replay.fleet import scenario_fleet
from servegym.replay.forced import Factors, Forced
from servegym.replay.log import ReplayLog, read_log

from .live import scenario


def load(path: Path) -> tuple[ReplayLog, Forced, Observed]:
    log = read_log([path], scenario_fleet(scenario()))
    forced = Forced.of(log)
    return log, forced, Observed.of(log, forced)


def drift_of(path: Path, **settings: float) -> Drift:
    _, forced, observed = load(path)
    [expected] = forced.play([Factors.ones(len(forced.fleet.names))])
    return find_drift(forced, observed, expected, **settings)
