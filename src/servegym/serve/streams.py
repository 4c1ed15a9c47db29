"""What the streams of tokens show of the replicas they come from."""

from __future__ import annotations

import numpy as np

from servegym.cluster.watch import longest_step_s
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    MAX_NUM_BATCHED_TOKENS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    RECENT_ITL_S,
    STEP_TIME_RATIO,
)
from servegym.policy.inferred import itl_kept, recent_itl_s, step_time_ratio, steps_kept
from servegym.typing import FloatArray

_NO_STEP_S = 1e-9


class Streams:
    """What token streams show of their replicas; `cluster.watch` in a router's own words.

    Whenever tokens come, the time since the last ones has been seen, if any stream decoded since.
    Each token is a share of a step in which every decoding stream gets one. Steps did nothing but
    decode if all that were outstanding had got tokens when they began.

    Args:
        width: Slots of the fleet, in use or free.
    """

    def __init__(self, width: int) -> None:
        self._num = np.zeros(width)
        self._last_s = np.zeros(width)
        self._is_pure = np.zeros(width, np.bool_)  # in the step in progress
        self._step_is_pure = np.zeros(width, np.bool_)  # in the one whose tokens come
        self._seen_s = np.zeros(width)
        self._seen_steps = np.zeros(width)
        self._pure_s = np.zeros(width)
        self._pure_steps = np.zeros(width)
        self._pure_others = np.zeros(width)
        self._late_s = np.zeros(width)
        self._late_expected_s = np.zeros(width)
        self._itl_s = np.zeros(width)
        self._itl_steps = np.zeros(width)
        self._observed_s = np.zeros(width)
        self._expected_s = np.zeros(width)
        self._looked_s = 0.0

    def grow(self, more: int) -> None:
        """Make room for so many more replicas."""
        for name, values in vars(self).items():
            if isinstance(values, np.ndarray):
                setattr(self, name, np.append(values, np.zeros(more, values.dtype)))

    def clear(self, r: int) -> None:
        """Another replica takes the place of one that has gone."""
        for values in vars(self).values():
            if isinstance(values, np.ndarray):
                values[r] = 0

    def begin(self, r: int, outstanding: int, now_s: float) -> None:
        """A stream begins to decode, of so many requests that are there."""
        if self._num[r] == 0.0:
            self._last_s[r] = now_s
        self._num[r] += 1.0
        self._is_pure[r] = self._num[r] == outstanding

    def end(self, r: int) -> None:
        """A stream has ended."""
        self._num[r] -= 1.0

    def step(
        self, r: int, count: int, unseen: float, outstanding: int, row: FloatArray, now_s: float
    ) -> None:
        """A stream that decodes has got tokens.

        Args:
            r: Replica.
            count: How many.
            unseen: Requests there whose streams others pass on.
            outstanding: All requests there.
            row: Of the replica, `float64[NUM_REPLICA_FEATURES]`.
            now_s: When they came.
        """
        since_s = max(0.0, now_s - self._last_s[r])
        self._last_s[r] += since_s
        share = count / self._num[r]
        self._seen_s[r] += since_s
        self._seen_steps[r] += share
        if since_s > 0.0:  # else these tokens are of the step that the last ones were of
            self._step_is_pure[r] = self._is_pure[r]
        if self._step_is_pure[r]:
            self._pure_s[r] += since_s
            self._pure_steps[r] += share
            self._pure_others[r] += share * (self._num[r] - 1.0)
        elif since_s > 0.0:
            most_s = count * longest_step_s(
                row[DECODE_STEP_S],
                row[DECODE_SEQ_S],
                self._num[r] + unseen,
                row[PENDING_PREFILL_TOKENS],
                row[MAX_NUM_BATCHED_TOKENS],
                row[PREFILL_TOKENS_PER_S],
            )
            if since_s > most_s:
                self._late_s[r] += since_s
                self._late_expected_s[r] += most_s
        self._is_pure[r] = self._num[r] == outstanding

    def skip(self, r: int, now_s: float) -> None:
        """Tokens have come that nobody watches."""
        self._last_s[r] = now_s

    def look(self, replicas: FloatArray, now_s: float) -> None:
        """Fill rows `step_time_ratio` and `recent_itl_s`."""
        since_s = now_s - self._looked_s
        self._looked_s = now_s
        # a free slot has no step time; nobody sees what comes out there
        alone_s, seq_s = np.maximum(replicas[DECODE_STEP_S], _NO_STEP_S), replicas[DECODE_SEQ_S]
        observed_s = self._pure_s + self._late_s
        expected_s = self._pure_steps * alone_s + self._pure_others * seq_s + self._late_expected_s
        kept = itl_kept(since_s)
        self._itl_s = kept * self._itl_s + self._seen_s
        self._itl_steps = kept * self._itl_steps + self._seen_steps
        kept = steps_kept(since_s, observed_s)
        self._observed_s = kept * self._observed_s + observed_s
        self._expected_s = kept * self._expected_s + expected_s
        for seen in (
            self._seen_s,
            self._seen_steps,
            self._pure_s,
            self._pure_steps,
            self._pure_others,
            self._late_s,
            self._late_expected_s,
        ):
            seen[:] = 0.0
        replicas[STEP_TIME_RATIO] = step_time_ratio(self._observed_s, self._expected_s)
        replicas[RECENT_ITL_S] = recent_itl_s(self._itl_s, self._itl_steps, alone_s)
