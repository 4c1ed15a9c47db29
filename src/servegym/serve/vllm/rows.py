"""The features of an engine's requests, kept from step to step.

Only what changed is written anew: most of a long queue costs nothing but a look-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from servegym.policy.ordering import (
    CLIENT_PRIORITY,
    DEADLINE_SLACK_S,
    GENERATED_TOKENS,
    IDLE_S,
    IS_RUNNING,
    KV_BLOCKS,
    NO_LIMIT_S,
    NUM_ORDERING_FEATURES,
    NUM_PREEMPTIONS,
    NUM_RUNNING,
    PREDICTED_REMAINING_TOKENS,
    PROMPT_TOKENS,
    TTFT_SLACK_S,
    WAITED_S,
)
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.hints import E2E_SLO_S, PREDICTED_OUTPUT_TOKENS, TTFT_SLO_S, hint
from servegym.typing import FloatArray, IntArray

# from here to `KV_BLOCKS` they change in every step of a running request
#: The engine's own columns, from this one on.
# What is kept of a request besides features, behind them in the same row. The times stand in the
# order of the features that are made of them, two by two: each pair is one subtraction.
_ARRIVAL, _IDLE_SINCE, _TTFT_DUE, _DUE, _PREDICTED, _WIDTH = range(
    NUM_ORDERING_FEATURES, NUM_ORDERING_FEATURES + 6
)

#: Weight of the newest ended request in the average output length.
_LENGTH_WEIGHT = 0.02


class RequestRows:
    """One row for each request that the engine has not ended.

    NumPy calls on cold caches cost several microseconds each, whatever their size; this is written
    to need few of them.

    Requests are vLLM's `Request` objects, or anything with their `num_prompt_tokens`,
    `num_computed_tokens`, `num_output_tokens`, `num_preemptions`, `max_tokens`, `arrival_time`,
    `priority` and `sampling_params.extra_args`.

    Attributes:
        memory: What the policy keeps of each, `float64[capacity, memory_size]`.
        score: Latest kept score of each, `float64[capacity]`; NaN before the first.
        scored_step: Step of that score, `int64[capacity]`.
    """

    def __init__(
        self,
        config: PluginConfig,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        memory_size: int,
        capacity: int = 256,
    ) -> None:
        self._config = config
        self._block_size = block_size
        self._engine = np.array([0.0, 0.0, 0.0, 0.0, max_num_batched_tokens])
        self._slots: dict[Any, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._rows = np.zeros((capacity, _WIDTH))
        self.memory = np.zeros((capacity, memory_size))
        self.score = np.full(capacity, np.nan)
        self.scored_step = np.zeros(capacity, np.int64)
        self._any_limit = False
        self._mean_output_tokens = 0.0

    def __len__(self) -> int:
        return len(self._slots)

    def client_priority(self, request: Any) -> float:
        """Return the priority a request came with, whatever was written over it since."""
        slot = self._slots.get(request)
        return float(request.priority if slot is None else self._rows[slot, CLIENT_PRIORITY])

    def slot(self, request: Any) -> int | None:
        """Return a request's row, or None if it has none."""
        return self._slots.get(request)

    def slots(self, requests: Sequence[Any]) -> IntArray:
        """Return the requests' rows, `int64[n]`; those seen for the first time get one."""
        known = self._slots
        try:
            return np.array([known[request] for request in requests], np.int64)
        except KeyError:
            for request in requests:
                if request not in known:
                    self._add(request)
        return np.array([known[request] for request in requests], np.int64)

    def _add(self, request: Any) -> None:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        arrival_s = float(request.arrival_time)
        row = self._rows[slot]
        row[:] = 0.0
        row[CLIENT_PRIORITY] = request.priority
        row[PROMPT_TOKENS] = request.num_prompt_tokens
        row[TTFT_SLACK_S] = row[DEADLINE_SLACK_S] = NO_LIMIT_S
        row[_ARRIVAL] = row[_IDLE_SINCE] = arrival_s
        row[_TTFT_DUE] = self._due_s(arrival_s, hint(request, TTFT_SLO_S), self._config.ttft_slo_s)
        row[_DUE] = self._due_s(arrival_s, hint(request, E2E_SLO_S), self._config.e2e_slo_s)
        row[_PREDICTED] = self._predict(request)
        self.memory[slot] = 0.0
        self.score[slot] = np.nan
        self.scored_step[slot] = 0
        self._slots[request] = slot

    def _due_s(self, arrival_s: float, own_slo_s: float | None, slo_s: float) -> float:
        limit_s = own_slo_s or slo_s
        if limit_s >= NO_LIMIT_S:
            return math.inf
        self._any_limit = True
        return arrival_s + limit_s

    def _predict(self, request: Any) -> float:
        told = hint(request, PREDICTED_OUTPUT_TOKENS)
        if told is not None:
            return min(told, float(request.max_tokens))
        if self._config.predict == "mean" and self._mean_output_tokens:
            return min(self._mean_output_tokens, float(request.max_tokens))
        return float(request.max_tokens)

    def _grow(self) -> None:
        size = len(self._rows)
        self._free = list(range(2 * size - 1, size - 1, -1))
        for name in ("_rows", "memory", "score", "scored_step"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros_like(old)]))

    def forget_ended(self, requests: Mapping[str, Any]) -> None:
        """Free the rows of requests that ended.

        Args:
            requests: All that have not, by id.
        """
        if len(self._slots) <= len(requests):
            return
        keep = set(requests.values())
        for request in [request for request in self._slots if request not in keep]:
            self._free.append(self._slots.pop(request))
            self._learn_length(request.num_output_tokens)

    def _learn_length(self, output_tokens: int) -> None:
        if output_tokens > 0:
            old = self._mean_output_tokens or float(output_tokens)
            self._mean_output_tokens = old + _LENGTH_WEIGHT * (output_tokens - old)

    def read(
        self,
        waiting: Sequence[Any],
        running: Sequence[Any],
        now_s: float,
        *,
        kv_cache_usage: float,
        step_s: float,
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        """Return the requests as of now, the waiting ones first.

        Args:
            waiting: Requests in the waiting queue.
            running: Requests in the running list.
            now_s: Same clock as `arrival_time`.
            kv_cache_usage: Share of KV blocks held.
            step_s: Recent step time.

        Returns:
            Their rows `int64[n]`, features `float64[n, NUM_ORDERING_FEATURES]` and arrival times
            `float64[n]`.
        """
        num_waiting = len(waiting)
        slots = self.slots([*waiting, *running])
        self._note_preempted(waiting, slots, now_s)
        rows = self._rows.take(slots, axis=0)
        if running:
            size = self._block_size
            rows[num_waiting:, IS_RUNNING : KV_BLOCKS + 1] = [
                (1, (computed := r.num_computed_tokens), r.num_output_tokens, -(-computed // size))
                for r in running
            ]
        remaining = rows[:, PREDICTED_REMAINING_TOKENS]
        np.subtract(rows[:, _PREDICTED], rows[:, GENERATED_TOKENS], out=remaining)
        np.maximum(remaining, 1.0, out=remaining)
        since_s = rows[:, _ARRIVAL : _IDLE_SINCE + 1]
        np.subtract(now_s, since_s, out=rows[:, WAITED_S : IDLE_S + 1])
        rows[num_waiting:, IDLE_S] = 0.0
        if self._any_limit:
            left = rows[:, _TTFT_DUE : _DUE + 1] - now_s
            rows[:, TTFT_SLACK_S : DEADLINE_SLACK_S + 1] = np.minimum(left, NO_LIMIT_S)
            rows[rows[:, GENERATED_TOKENS] > 0.0, TTFT_SLACK_S] = NO_LIMIT_S
        self._engine[:4] = len(running), num_waiting, kv_cache_usage, step_s
        rows[:, NUM_RUNNING:NUM_ORDERING_FEATURES] = self._engine
        return slots, rows[:, :NUM_ORDERING_FEATURES], rows[:, _ARRIVAL]

    def _note_preempted(self, waiting: Sequence[Any], slots: IntArray, now_s: float) -> None:
        """Write what may have changed of waiting requests: only those that ran before."""
        for i, request in enumerate(waiting):
            if request.num_preemptions:
                row = self._rows[slots[i]]
                if row[NUM_PREEMPTIONS] != request.num_preemptions:
                    row[_IDLE_SINCE] = now_s
                row[NUM_PREEMPTIONS] = request.num_preemptions
                row[GENERATED_TOKENS] = request.num_output_tokens
