"""Speculative decoding: how many drafts of a request are accepted, equal in both programs."""

from __future__ import annotations

import numpy as np

from servegym.cluster.jit import kernel
from servegym.cluster.rng import mix64, uniform
from servegym.typing import FloatArray


@kernel
def count_accepted(
    noise_seed: np.uint64, request: int, generated: int, drafts: int, acceptance: FloatArray
) -> int:
    """Draw how many of a request's drafts are accepted.

    They depend on its text alone: on who it is and how much of it is there, not on when, where or
    with whom it decodes.

    Args:
        noise_seed: Of the episode.
        request: Its index in the table.
        generated: Its output tokens so far.
        drafts: Tokens that were drafted behind these.
        acceptance: How often at least so many are, `float64[K]`, K at least `drafts`.
    """
    place = np.uint64(request) * np.uint64(0xD1B54A32D192ED03) + np.uint64(generated)
    drawn = uniform(np.uint64(noise_seed) ^ mix64(place ^ np.uint64(0x5851F42D4C957F2D)))
    accepted = 0
    while accepted < drafts and drawn < acceptance[accepted]:
        accepted += 1
    return accepted
