"""Fit the step time of a running engine to its own log, without kernel measurements."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from servegym.costs.measurements import error
from servegym.errors import ConfigError
from servegym.typing import FloatArray

_MIN_STEPS = 20


@dataclass(frozen=True)
class StepLogFit:
    """Step time as a sum of terms, none negative.

    `overhead_s + s_per_prefill_token * prefill + s_per_sequence * sequences
    + s_per_kv_token * kv_tokens + s_per_prefill_pair * prefill_pairs`

    Attributes:
        overhead_s: Every step: scheduler, launches, reading the weights.
        s_per_prefill_token: Compute of a prompt token.
        s_per_sequence: Compute and sampling of a decoding sequence.
        s_per_kv_token: Reading a cached token.
        error: Median and 95th percentile of the error in percent, on every second step, which
            the fit has not seen.
        s_per_prefill_pair: Attention of a prompt token to one before it; 0 if not in the log.
    """

    overhead_s: float
    s_per_prefill_token: float
    s_per_sequence: float
    s_per_kv_token: float
    error: tuple[float, float]
    s_per_prefill_pair: float = 0.0

    def step_s(
        self,
        prefill_tokens: npt.ArrayLike,
        decode_sequences: npt.ArrayLike,
        kv_tokens: npt.ArrayLike,
        prefill_pairs: npt.ArrayLike = 0,
    ) -> FloatArray:
        """Seconds that steps of these sizes take, `float64[N]`."""
        known_s = _columns(prefill_tokens, decode_sequences, kv_tokens) @ np.array(
            [self.overhead_s, self.s_per_prefill_token, self.s_per_sequence, self.s_per_kv_token]
        )
        return known_s + self.s_per_prefill_pair * np.asarray(prefill_pairs, np.float64)


def fit_step_log(
    prefill_tokens: npt.ArrayLike,
    decode_sequences: npt.ArrayLike,
    kv_tokens: npt.ArrayLike,
    duration_s: npt.ArrayLike,
    prefill_pairs: npt.ArrayLike | None = None,
) -> StepLogFit:
    """Fit by non-negative least squares on relative errors.

    Args:
        prefill_tokens: Prompt tokens computed in each step, `[N]`.
        decode_sequences: Sequences that decoded a token, `[N]`.
        kv_tokens: Cached tokens these attended to in all, `[N]`.
        duration_s: Of each step, `[N]`.
        prefill_pairs: Pairs of a prompt token and one it attended to, `[N]`, if logged.

    Returns:
        Coefficients, with their error on the half not fitted on.

    Raises:
        ConfigError: If the log is too short, its columns differ in length, or it holds values
            that are negative or not finite.
    """
    logged = [prefill_tokens, decode_sequences, kv_tokens]
    logged += [] if prefill_pairs is None else [prefill_pairs]
    terms = [np.asarray(x, np.float64) for x in logged]
    seconds = np.asarray(duration_s, np.float64)
    if len({column.shape for column in (*terms, seconds)}) != 1:
        raise ConfigError("the columns of a step log must have the same length")
    if len(seconds) < _MIN_STEPS:
        raise ConfigError(f"a step log must have at least {_MIN_STEPS} steps, got {len(seconds)}")
    if not all(np.isfinite(x).all() and (x >= 0).all() for x in terms) or not (seconds > 0).all():
        raise ConfigError("a step log must hold finite counts from 0 and durations above 0 s")
    columns = _columns(*terms)
    seen = np.arange(len(seconds)) % 2 == 0
    found = _non_negative(columns[seen] / seconds[seen, None])
    off = error(columns[~seen] @ found, seconds[~seen])
    overhead, prompt, sequence, kv, *pair = (float(x) for x in found)
    return StepLogFit(overhead, prompt, sequence, kv, off, *pair)


def _columns(*terms: npt.ArrayLike) -> FloatArray:
    columns = [np.asarray(x, np.float64) for x in terms]
    return np.stack([np.ones(columns[0].shape), *columns], axis=-1)


def _non_negative(columns: FloatArray) -> FloatArray:
    """Minimise |columns x - 1| with x >= 0: the best of all subsets of the few terms."""
    count = columns.shape[1]
    ones = np.ones(len(columns))
    best, least = np.zeros(count), float(len(columns))
    for size in range(1, count + 1):
        for subset in combinations(range(count), size):
            found = np.linalg.lstsq(columns[:, subset], ones, rcond=None)[0]
            rest = float(np.sum((columns[:, subset] @ found - 1.0) ** 2))
            if (found >= 0).all() and rest < least:
                best, least = np.zeros(count), rest
                best[list(subset)] = found
    return best
