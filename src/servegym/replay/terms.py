"""The terms of a step's cost that can drift, each with a factor of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from servegym.costs.grid import CostGrid
from servegym.typing import FloatArray, IntArray

#: Terms with a factor, in the order of the factors' arrays.
TERMS = ("step", "kv", "prefill")


class StepParts(NamedTuple):
    """Seconds of decode steps by term, `float64[n]` each."""

    step_s: FloatArray
    kv_s: FloatArray
    tokens_s: FloatArray


def scaled(grid: CostGrid, step: float, kv: float, prefill: float) -> CostGrid:
    """Multiply the terms of a cost grid.

    A step of one token, without attention, is the term `step`; what further tokens add is
    `prefill`, whether they belong to a prompt or to another sequence.

    Args:
        grid: The costs.
        step: Factor on what every step costs.
        kv: Factor on the attention of decoding sequences.
        prefill: Factor on prompt tokens and their attention.
    """
    one_s = grid.dense(1.0)
    return replace(
        grid,
        cpu_s=step * grid.cpu_s,
        dense_s=step * one_s + prefill * (grid.dense_s - one_s),
        prefill_s=prefill * grid.prefill_s,
        decode_s=kv * grid.decode_s,
        mixed_s=kv * grid.mixed_s,
    )


def decode_parts(grid: CostGrid, batch: FloatArray, kv_tokens: FloatArray) -> StepParts:
    """Split decode steps into their terms.

    Args:
        grid: The costs.
        batch: Sequences of each step, `float64[n]`.
        kv_tokens: Tokens that they attend to in all, `float64[n]`.
    """
    one_s = grid.dense(1.0)
    i, w = _locate(grid.decode_batch, batch)
    j, z = _locate(grid.decode_kv, kv_tokens)
    v = grid.decode_s
    low = v[i, j] + z * (v[i, j + 1] - v[i, j])
    high = v[i + 1, j] + z * (v[i + 1, j + 1] - v[i + 1, j])
    return StepParts(
        step_s=np.full(len(batch), grid.cpu_s + one_s),
        kv_s=low + w * (high - low),
        tokens_s=np.interp(batch, grid.dense_tokens, grid.dense_s) - one_s,
    )


def _locate(knots: FloatArray, x: FloatArray) -> tuple[IntArray, FloatArray]:
    """Return the knot before each `x` and how far it is towards the next, as `CostGrid` does."""
    i = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, len(knots) - 2)
    return i, (x - knots[i]) / (knots[i + 1] - knots[i])
