"""Counter-based random numbers, equal in compiled and plain code."""

from __future__ import annotations

import math

import numpy as np

from servegym.cluster.jit import kernel


@kernel
def mix64(x: np.uint64) -> np.uint64:
    """Scramble 64 bits (the SplitMix64 finaliser: Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def uniform(counter: np.uint64) -> float:
    """Return the number in (0, 1) that belongs to a counter value."""
    return (float(mix64(counter) >> np.uint64(11)) + 0.5) / 9007199254740992.0


@kernel
def next_uniform(state: np.ndarray) -> float:
    """Advance a stream (`uint64[1]`) and return its next number in (0, 1)."""
    state[0] = state[0] + np.uint64(0x9E3779B97F4A7C15)
    return uniform(state[0])


@kernel
def step_noise_z(noise_seed: np.uint64, replica: int, window: int) -> float:
    """Return the standard normal number of one window of steps of one replica."""
    base = mix64(
        np.uint64(noise_seed)
        ^ mix64(np.uint64(replica) * np.uint64(0xD1B54A32D192ED03) + np.uint64(window))
    )
    u = uniform(base)
    v = uniform(base + np.uint64(0x9E3779B97F4A7C15))
    return math.sqrt(-2.0 * math.log(u)) * math.cos(2.0 * math.pi * v)
