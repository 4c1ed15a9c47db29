"""How well a device is known from its data sheet and a few steps, leaving out whole devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from servegym.assets.specs import ModelSpec, gpu
from servegym.calibrate.adaptation import (
    AdaptedSource,
    fit_factors,
    learn,
    step_seconds,
    typical_steps,
)
from servegym.calibrate.datasheet import measured_gpus, prior_spec
from servegym.costs.measurements import error
from servegym.costs.tables import TableSource
from servegym.typing import FloatArray

#: Steps that the error is stated on, and how much a measured step scatters.
_NUM_TESTED = 200
_SCATTER = 0.03


@dataclass(frozen=True)
class LeftOut:
    """A device that nothing was learned from.

    Attributes:
        gpu: Its name.
        prior: Error of the data sheet's prior: median and 95th percentile in percent.
        adapted: The same by number of measured steps, means over the draws.
        scaled: The same with one factor for the whole step.
    """

    gpu: str
    prior: tuple[float, float]
    adapted: dict[int, tuple[float, float]]
    scaled: dict[int, tuple[float, float]]


def tested_gpus() -> list[str]:
    """GPUs that there are measured tables of."""
    return [name for name in measured_gpus() if gpu(name).aic_system]


def leave_out(
    model: ModelSpec,
    samples: tuple[int, ...],
    draws: int = 20,
    devices: list[str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[LeftOut]:
    """Leave out each device in turn; its steps are sums of its measured kernels.

    Args:
        model: What the steps compute, on one device.
        samples: Numbers of measured steps, each at most 10.
        draws: Random choices of these steps; each measured with a scatter of 3 %.
        devices: To leave out; all that there are tables of by default.
        advance: Called after each device.

    Raises:
        ConfigError: If the tables are not installed.
    """
    found = []
    for name in tested_gpus() if devices is None else devices:
        found.append(_left_out(name, model, samples, draws))
        advance()
    return found


def _left_out(name: str, model: ModelSpec, samples: tuple[int, ...], draws: int) -> LeftOut:
    others = [other for other in measured_gpus() if other != name]
    base = prior_spec(gpu(name), others)
    experience = learn(model, 1, others)
    tables = TableSource(gpu(name))
    tested = typical_steps(_NUM_TESTED, seed=1)
    true_s = step_seconds(tables, gpu(name), model, 1, tested)
    prior_s = step_seconds(AdaptedSource(base), base, model, 1, tested)
    adapted: dict[int, list[tuple[float, float]]] = {count: [] for count in samples}
    scaled: dict[int, list[tuple[float, float]]] = {count: [] for count in samples}
    for draw in range(draws):
        pool = typical_steps(max(*samples, 1), seed=100 + draw)
        scatter = np.random.default_rng(draw).lognormal(0.0, _SCATTER, len(pool))
        seconds = scatter * step_seconds(tables, gpu(name), model, 1, pool)
        expected = step_seconds(AdaptedSource(base), base, model, 1, pool)
        for count in samples:
            few = np.arange(count)
            factors = fit_factors(base, model, 1, pool[few], seconds[few], experience)
            source = AdaptedSource(base, factors=factors)
            adapted[count].append(error(step_seconds(source, base, model, 1, tested), true_s))
            factor = float(np.exp(np.mean(np.log(seconds / expected)[:count]))) if count else 1.0
            scaled[count].append(error(factor * prior_s, true_s))
    return LeftOut(
        gpu=name,
        prior=error(prior_s, true_s),
        adapted={count: _mean(errors) for count, errors in adapted.items()},
        scaled={count: _mean(errors) for count, errors in scaled.items()},
    )


def _mean(errors: list[tuple[float, float]]) -> tuple[float, float]:
    both: FloatArray = np.mean(errors, axis=0)
    return round(float(both[0]), 1), round(float(both[1]), 1)
