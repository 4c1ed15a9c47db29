"""Arrival processes: times of arrival in seconds, ascending from 0."""

from __future__ import annotations

import math

import numpy as np

from servegym.typing import FloatArray


def poisson(rng: np.random.Generator, num: int, rate_rps: float) -> FloatArray:
    """Draw a Poisson process, `float64[num]`."""
    return np.cumsum(rng.exponential(1.0 / rate_rps, num))


def gamma(rng: np.random.Generator, num: int, rate_rps: float, cv: float) -> FloatArray:
    """Draw a renewal process with gamma gaps of coefficient of variation `cv`."""
    shape = 1.0 / (cv * cv)
    return np.cumsum(rng.gamma(shape, 1.0 / (shape * rate_rps), num))


def weibull(rng: np.random.Generator, num: int, rate_rps: float, cv: float) -> FloatArray:
    """Draw a renewal process with Weibull gaps of coefficient of variation `cv`."""
    low, high = 0.1, 20.0  # the CV falls with the shape
    for _ in range(80):
        shape = math.sqrt(low * high)
        first, second = math.gamma(1 + 1 / shape), math.gamma(1 + 2 / shape)
        if math.sqrt(max(0.0, second / first**2 - 1)) > cv:
            low = shape
        else:
            high = shape
    scale = 1.0 / (rate_rps * math.gamma(1 + 1 / shape))
    return np.cumsum(scale * rng.weibull(shape, num))


def bursts(
    rng: np.random.Generator, num: int, rate_rps: float, ratio: float, period_s: float, share: float
) -> FloatArray:
    """Draw a two-state Markov-modulated Poisson process.

    Args:
        rng: Randomness.
        num: Arrivals.
        rate_rps: Mean rate over both states.
        ratio: Rate in a burst over the rate between bursts.
        period_s: Mean time from one burst's start to the next one's.
        share: Share of time in bursts.
    """
    calm = rate_rps / (1.0 + share * (ratio - 1.0))
    means = (period_s * (1.0 - share), period_s * share)
    rates = (calm, calm * ratio)
    times: list[FloatArray] = []
    start_s, count, state = 0.0, 0, int(rng.random() < share)
    while count < num:
        length = rng.exponential(means[state])
        part = np.sort(rng.uniform(start_s, start_s + length, rng.poisson(rates[state] * length)))
        times.append(part)
        count += len(part)
        start_s += length
        state = 1 - state
    return np.concatenate(times)[:num]


def diurnal(
    rng: np.random.Generator, num: int, rate_rps: float, amplitude: float, period_s: float
) -> FloatArray:
    """Draw a Poisson process whose rate swings as `1 + amplitude * sin(2 pi t / period)`."""
    unit = np.cumsum(rng.exponential(1.0, num))
    # expected arrivals by t, inverted on a fine grid
    horizon = (unit[-1] / rate_rps) * 1.1 + 2 * period_s
    t = np.linspace(0.0, horizon, max(1000, int(200 * horizon / period_s)))
    swing = amplitude * period_s / (2 * np.pi) * (1 - np.cos(2 * np.pi * t / period_s))
    return np.interp(unit, rate_rps * (t + swing), t)
