"""Under which conditions each logged request was computed, and what share each term had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from servegym.costs.grid import CostGrid
from servegym.replay.forced import Forced
from servegym.replay.log import ReplayLog
from servegym.replay.terms import TERMS, decode_parts
from servegym.typing import BoolArray, FloatArray, IntArray

#: An answer over fewer gaps counts for less: its TPOT is a mean of few steps.
_FULL_GAPS = 16


@dataclass(frozen=True)
class Observed:
    """What the log says of the simulated requests; times count from the last dispatch.

    Attributes:
        ttft_s: `float64[m]`.
        e2e_s: `float64[m]`.
        gaps: Output tokens after the first, `int64[m]`.
        usable: Which are compared: finished, with a first token told apart, `bool[m]`.
        replica: `int64[m]`.
        at_s: Of the dispatch, `float64[m]`.
    """

    ttft_s: FloatArray
    e2e_s: FloatArray
    gaps: IntArray
    usable: BoolArray
    replica: IntArray
    at_s: FloatArray

    @classmethod
    def of(cls, log: ReplayLog, forced: Forced) -> Observed:
        """Take them from a log."""
        rows = forced.rows
        wait_s = log.dispatch_s[rows]
        ttft_s, e2e_s = log.ttft_s[rows] - wait_s, log.e2e_s[rows] - wait_s
        usable = log.finished[rows] & log.streamed[rows] & (ttft_s > 0) & (e2e_s > 0)
        gaps = log.table.output_tokens[rows].astype(np.int64) - 1
        return cls(ttft_s, e2e_s, gaps, usable, forced.actions, forced.table.arrival_s)

    def ended_by(self, time_s: float) -> Observed:
        """Return what was known at a time: requests that had ended."""
        known = self.usable & (self.at_s + self.e2e_s <= time_s)
        return Observed(self.ttft_s, self.e2e_s, self.gaps, known, self.replica, self.at_s)

    @property
    def weight(self) -> FloatArray:
        """How much TTFT and TPOT of each request count, `float64[2, m]`."""
        paced = self.usable & (self.gaps > 0) & (self.e2e_s > self.ttft_s)
        return np.stack((self.usable * 1.0, paced * np.minimum(self.gaps / _FULL_GAPS, 1.0)))

    @property
    def logs(self) -> FloatArray:
        """Logarithms of TTFT and TPOT, `float64[2, m]`; not finite where they have no weight."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(np.stack((self.ttft_s, (self.e2e_s - self.ttft_s) / self.gaps)))


class Conditions(NamedTuple):
    """What each request shared its replica with, from times observed or simulated.

    Attributes:
        batch: Decoding sequences while it decoded, itself included, on average, `float64[m]`.
        kv_tokens: Tokens that these attended to in all, `float64[m]`.
        shares: Of each term in TTFT and TPOT, as its cost model has it, queues aside,
            `float64[2, m, len(TERMS)]`.
    """

    batch: FloatArray
    kv_tokens: FloatArray
    shares: FloatArray


def conditions(
    forced: Forced, ttft_s: FloatArray, e2e_s: FloatArray, cached_tokens: IntArray
) -> Conditions:
    """Reconstruct the conditions of requests from when each had its first and its last token.

    Args:
        forced: The requests.
        ttft_s: After the dispatch, NaN where there was none, `float64[m]`.
        e2e_s: After the dispatch, `float64[m]`.
        cached_tokens: Prompt tokens found cached, `int64[m]`.
    """
    num = len(forced)
    batch, kv_tokens = np.ones(num), np.ones(num)
    shares = np.zeros((2, num, len(TERMS)))
    at_s = forced.table.arrival_s
    first_s, end_s = at_s + ttft_s, at_s + e2e_s
    prompt, output = forced.table.prompt_tokens, forced.table.output_tokens
    context = prompt + 0.5 * output
    fresh = np.maximum(prompt - cached_tokens, 1).astype(np.float64)
    for r, replica in enumerate(forced.fleet.types):
        rows = np.flatnonzero((forced.actions == r) & np.isfinite(first_s))
        if not len(rows):
            continue
        grid = replica.grid
        begin, end = first_s[rows], np.maximum(end_s[rows], first_s[rows])
        span = np.maximum(end - begin, 1e-9)
        batch[rows] = np.maximum(_overlap(begin, end, np.ones(len(rows))) / span, 1.0)
        attended = _overlap(begin, end, context[rows]) / span
        kv_tokens[rows] = np.maximum(attended, context[rows])
        token_s = _token_s(grid, float(np.median(fresh[rows])))
        parts = decode_parts(grid, batch[rows], kv_tokens[rows])
        gaps = np.maximum(output[rows] - 1, 1)
        others = _prompts_between(begin, fresh[rows], begin, end)
        of_tpot = (
            gaps * parts.step_s,
            gaps * parts.kv_s,
            gaps * parts.tokens_s + token_s * others,
        )
        tokens = fresh[rows] + _prompts_between(begin, fresh[rows], at_s[rows], begin)
        # on average half a step passes before the first that the request is in
        steps = np.maximum(1.0, tokens / replica.max_num_batched_tokens) + 0.5
        of_ttft = (steps * parts.step_s, steps * parts.kv_s, token_s * tokens)
        for kind, seconds in enumerate((of_ttft, of_tpot)):
            shares[kind, rows] = (np.stack(seconds) / np.sum(seconds, axis=0)).T
    return Conditions(batch, kv_tokens, shares)


def _overlap(begin: FloatArray, end: FloatArray, value: FloatArray) -> FloatArray:
    """Integrate over each interval the sum of the values of all intervals that are open."""
    times = np.concatenate((begin, end))
    order = np.argsort(times, kind="stable")
    times = times[order]
    level = np.cumsum(np.concatenate((value, -value))[order])
    area = np.concatenate(([0.0], np.cumsum(level[:-1] * np.diff(times))))
    return np.asarray(np.interp(end, times, area) - np.interp(begin, times, area))


def _prompts_between(
    at_s: FloatArray, tokens: FloatArray, low_s: FloatArray, high_s: FloatArray
) -> FloatArray:
    """Sum the tokens of prompts that were done after `low_s` and before `high_s`."""
    order = np.argsort(at_s, kind="stable")
    total = np.concatenate(([0.0], np.cumsum(tokens[order])))
    first = np.searchsorted(at_s[order], low_s, side="right")
    last = np.searchsorted(at_s[order], high_s, side="left")
    return np.asarray(total[np.maximum(last, first)] - total[first])


def _token_s(grid: CostGrid, prompt: float) -> float:
    """Seconds that a token of a prompt of such a length adds to a step."""
    prompt = max(prompt, 2.0)
    return (grid.dense(prompt) - grid.dense(1.0) + grid.prefill(prompt, 0.0)) / prompt
