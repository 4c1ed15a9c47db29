"""What makes life hard in a scenario: stale metrics, wrong predictions, noise and faults."""

from __future__ import annotations

import numpy as np
from pydantic import Field, field_validator

from servegym.cluster.spec import Faults
from servegym.cluster.state import FAULT_DOWN, FAULT_SLOW, FAULT_UP
from servegym.scenario.config import Config, Factor, ascending
from servegym.workloads.prediction import PredictorConfig


class FailSlowConfig(Config):
    """Episodes in which a replica runs at a fraction of its speed."""

    rate_per_replica_hour: float = Field(0.0, ge=0)
    duration_s: float = Field(30.0, gt=0)
    multiplier: tuple[Factor, Factor] = (0.2, 0.6)

    _check_range = field_validator("multiplier")(ascending)


class FailStopConfig(Config):
    """Crashes; a replica is back, empty, after `recovery_s`."""

    rate_per_replica_hour: float = Field(0.0, ge=0)
    recovery_s: float = Field(60.0, gt=0)


class DisturbanceConfig(Config):
    """What makes life hard; everything is off by default."""

    metrics_interval_s: float = Field(0.0, ge=0)
    predictor: PredictorConfig = PredictorConfig(kind="lognormal", sigma=0.5)
    step_noise_sigma: float = Field(0.0, ge=0)
    noise_period_steps: int = Field(8, ge=1)
    fail_slow: FailSlowConfig = FailSlowConfig()
    fail_stop: FailStopConfig = FailStopConfig()


def draw_faults(
    slow: FailSlowConfig,
    stop: FailStopConfig,
    rng: np.random.Generator,
    num_replicas: int,
    end_s: float,
) -> Faults:
    """Draw when replicas slow down, crash and come back, for faults that begin by `end_s`."""
    rows: list[tuple[float, int, int, float]] = []
    for r in range(num_replicas):
        t = 0.0
        while slow.rate_per_replica_hour:
            t += rng.exponential(3600.0 / slow.rate_per_replica_hour)
            if t > end_s:
                break
            rows.append((t, r, FAULT_SLOW, rng.uniform(*slow.multiplier)))
            t += slow.duration_s
            rows.append((t, r, FAULT_SLOW, 1.0))
        t = 0.0
        while stop.rate_per_replica_hour:
            t += rng.exponential(3600.0 / stop.rate_per_replica_hour)
            if t > end_s:
                break
            rows.append((t, r, FAULT_DOWN, 0.0))
            t += stop.recovery_s
            rows.append((t, r, FAULT_UP, 0.0))
    rows.sort()
    return Faults(
        np.array([x[0] for x in rows], np.float64),
        np.array([x[1] for x in rows], np.int16),
        np.array([x[2] for x in rows], np.int8),
        np.array([x[3] for x in rows], np.float64),
    )
