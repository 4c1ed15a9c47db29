"""The features of an engine's requests, kept from step to step.

Only what changed is written anew: most of a long queue costs nothing but a look-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from servegym.policy.ordering import NO_LIMIT_S, NUM_ORDERING_FEATURES, OrderingFeature
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.hints import E2E_SLO_S, PREDICTED_OUTPUT_TOKENS, TTFT_SLO_S, hint
from servegym.typing import FloatArray, IntArray

_RUNNING = int(OrderingFeature["IS_RUNNING"])
_PRIORITY = int(OrderingFeature["CLIENT_PRIORITY"])
_PROMPT = int(OrderingFeature["PROMPT_TOKENS"])
_COMPUTED = int(OrderingFeature["COMPUTED_TOKENS"])
_GENERATED = int(OrderingFeature["GENERATED_TOKENS"])
_REMAINING = int(OrderingFeature["PREDICTED_REMAINING_TOKENS"])
_WAITED = int(OrderingFeature["WAITED_S"])
_IDLE = int(OrderingFeature["IDLE_S"])
_BLOCKS = int(OrderingFeature["KV_BLOCKS"])
_PREEMPTIONS = int(OrderingFeature["NUM_PREEMPTIONS"])
_TTFT_SLACK = int(OrderingFeature["TTFT_SLACK_S"])
_DEADLINE_SLACK = int(OrderingFeature["DEADLINE_SLACK_S"])
#: The engine's own columns, from this one on.
_ENGINE = int(OrderingFeature["NUM_RUNNING"])

#: Weight of the newest ended request in the average output length.
_LENGTH_WEIGHT = 0.02
#: Columns of `_fixed`.
_ARRIVAL, _TTFT_DUE, _DUE, _PREDICTED, _IDLE_SINCE = range(5)


class RequestRows:
    """One row for each request that the engine has not ended.

    Requests are vLLM's `Request` objects, or anything with their `num_prompt_tokens`,
    `num_computed_tokens`, `num_output_tokens`, `num_preemptions`, `max_tokens`, `arrival_time`,
    `priority` and `sampling_params.extra_args`.

    Attributes:
        memory: What the policy keeps of each, `float64[capacity, memory_size]`.
        score: Latest score of each, `float64[capacity]`; NaN before the first.
        scored_step: Step of that score, `int64[capacity]`.
        rank: Place of each in the latest order, `int64[capacity]`.
        num_running: Length of the running list when the features were last made.
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
        self._budget = float(max_num_batched_tokens)
        self._slots: dict[Any, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self._features = np.zeros((capacity, NUM_ORDERING_FEATURES))
        self._fixed = np.zeros((capacity, 5))
        self.memory = np.zeros((capacity, memory_size))
        self.score = np.full(capacity, np.nan)
        self.scored_step = np.zeros(capacity, np.int64)
        self.rank = np.zeros(capacity, np.int64)
        self.num_running = 0
        self._mean_output_tokens = 0.0

    def __len__(self) -> int:
        return len(self._slots)

    def client_priority(self, request: Any) -> float:
        """Return the priority a request came with, whatever was written over it since."""
        slot = self._slots.get(request)
        return float(request.priority if slot is None else self._features[slot, _PRIORITY])

    def places(self, requests: Iterable[Any], *, running: bool) -> list[int]:
        """Return places in the latest order.

        Args:
            requests: Those that have none are passed over.
            running: Whether those that were running are meant, or those that were waiting.
        """
        slots = [slot for slot in map(self._slots.get, requests) if slot is not None]
        return [int(self.rank[s]) for s in slots if bool(self._features[s, _RUNNING]) is running]

    def arrival_s(self, slots: IntArray) -> FloatArray:
        """Return when the requests arrived, `float64[n]`."""
        arrived: FloatArray = self._fixed[slots, _ARRIVAL]
        return arrived

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
        ttft_slo_s = hint(request, TTFT_SLO_S) or self._config.ttft_slo_s
        e2e_slo_s = hint(request, E2E_SLO_S) or self._config.e2e_slo_s
        self._fixed[slot] = (
            arrival_s,
            arrival_s + min(ttft_slo_s, NO_LIMIT_S),
            arrival_s + min(e2e_slo_s, NO_LIMIT_S),
            self._predict(request),
            arrival_s,
        )
        row = self._features[slot]
        row[:] = 0.0
        row[_PRIORITY] = request.priority
        row[_PROMPT] = request.num_prompt_tokens
        self.memory[slot] = 0.0
        self.score[slot] = np.nan
        self.scored_step[slot] = self.rank[slot] = 0
        self._slots[request] = slot

    def _predict(self, request: Any) -> float:
        told = hint(request, PREDICTED_OUTPUT_TOKENS)
        if told is not None:
            return min(told, float(request.max_tokens))
        if self._config.predict == "mean" and self._mean_output_tokens:
            return min(self._mean_output_tokens, float(request.max_tokens))
        return float(request.max_tokens)

    def _grow(self) -> None:
        size = len(self._features)
        self._free = list(range(2 * size - 1, size - 1, -1))
        for name in ("_features", "_fixed", "memory", "score", "scored_step", "rank"):
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

    def features(
        self,
        waiting: Sequence[Any],
        running: Sequence[Any],
        slots: IntArray,
        now_s: float,
        *,
        kv_cache_usage: float,
        step_s: float,
    ) -> FloatArray:
        """Return the features as of now.

        Args:
            waiting: Requests in the waiting queue.
            running: Requests in the running list.
            slots: Rows of all of them, the waiting first, `int64[n]`.
            now_s: Same clock as `arrival_time`.
            kv_cache_usage: Share of KV blocks held.
            step_s: Recent step time.

        Returns:
            `float64[n, NUM_ORDERING_FEATURES]`, a row a slot.
        """
        num_waiting, self.num_running = len(waiting), len(running)
        self._update_running(running, slots[num_waiting:])
        self._update_waiting(waiting, slots[:num_waiting], now_s)
        rows = self._features[slots]
        fixed = self._fixed[slots]
        rows[:, _WAITED] = now_s - fixed[:, _ARRIVAL]
        rows[:num_waiting, _IDLE] = now_s - fixed[:num_waiting, _IDLE_SINCE]
        rows[:, _REMAINING] = np.maximum(fixed[:, _PREDICTED] - rows[:, _GENERATED], 1.0)
        slack = np.clip(fixed[:, _TTFT_DUE] - now_s, -NO_LIMIT_S, NO_LIMIT_S)
        # a limit not set lies 1e6 s after the arrival: all such requests are alike
        unlimited = fixed[:, _TTFT_DUE] - fixed[:, _ARRIVAL] >= NO_LIMIT_S
        answered = rows[:, _GENERATED] > 0.0
        rows[:, _TTFT_SLACK] = np.where(unlimited | answered, NO_LIMIT_S, slack)
        slack = np.clip(fixed[:, _DUE] - now_s, -NO_LIMIT_S, NO_LIMIT_S)
        unlimited = fixed[:, _DUE] - fixed[:, _ARRIVAL] >= NO_LIMIT_S
        rows[:, _DEADLINE_SLACK] = np.where(unlimited, NO_LIMIT_S, slack)
        rows[:, _ENGINE:] = (self.num_running, num_waiting, kv_cache_usage, step_s, self._budget)
        return rows

    def _update_running(self, running: Sequence[Any], slots: IntArray) -> None:
        if not running:
            return
        changing = np.array([(r.num_computed_tokens, r.num_output_tokens) for r in running])
        self._features[slots, _RUNNING] = 1.0
        self._features[slots, _COMPUTED] = changing[:, 0]
        self._features[slots, _GENERATED] = changing[:, 1]
        self._features[slots, _BLOCKS] = -(-changing[:, 0] // self._block_size)

    def _update_waiting(self, waiting: Sequence[Any], slots: IntArray, now_s: float) -> None:
        for i, request in enumerate(waiting):
            # those that never ran are as they were
            if request.num_preemptions:
                slot = slots[i]
                row = self._features[slot]
                if row[_RUNNING] or row[_PREEMPTIONS] != request.num_preemptions:
                    self._fixed[slot, _IDLE_SINCE] = now_s
                row[_RUNNING] = row[_BLOCKS] = 0.0
                row[_PREEMPTIONS] = request.num_preemptions
                row[_COMPUTED] = request.num_computed_tokens
                row[_GENERATED] = request.num_output_tokens
