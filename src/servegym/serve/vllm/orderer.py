"""From the scores of a policy to places in the queue and among the victims."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from servegym.errors import ServeGymError
from servegym.policy.ordering import IS_RUNNING, OrderingPolicy
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.rows import RequestRows
from servegym.typing import FloatArray, IntArray

#: Weight of the newest step in the average step time.
_STEP_WEIGHT = 0.05


class Ranking(NamedTuple):
    """How a policy orders the requests of a step.

    Attributes:
        slots: Rows of the waiting requests, then of the running ones, `int64[w + r]`.
        order: Indices into those: the waiting, the first to be admitted first, then the running,
            the first to be preempted last, `int64[w + r]`.
        num_waiting: How many are waiting.
    """

    slots: IntArray
    order: IntArray
    num_waiting: int

    def places(self) -> dict[int, int]:
        """Return the place of each row in the order."""
        return {slot: place for place, slot in enumerate(self.slots[self.order].tolist())}


class InvalidScores(ServeGymError):
    """Raised when a policy's scores cannot be used."""


class Orderer:
    """Asks a policy for the order of an engine's requests.

    Attributes:
        rows: The requests and their features.
    """

    def __init__(
        self,
        policy: OrderingPolicy,
        config: PluginConfig,
        *,
        block_size: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._policy = policy
        self._max_scored = config.max_scored_waiting
        self.rows = RequestRows(
            config,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            memory_size=policy.memory_size,
        )
        self._step = 0
        self._step_s = 0.0

    def note_step(self, duration_s: float) -> None:
        """Take the duration of a step into the average."""
        old = self._step_s or duration_s
        self._step_s = old + _STEP_WEIGHT * (duration_s - old)

    def rank(
        self, waiting: Sequence[Any], running: Sequence[Any], now_s: float, kv_cache_usage: float
    ) -> Ranking:
        """Order the requests of an engine before a step.

        Args:
            waiting: Requests in the waiting queue, in any order.
            running: Requests in the running list.
            now_s: Same clock as their arrival times.
            kv_cache_usage: Share of KV blocks held.

        Returns:
            The order.

        Raises:
            InvalidScores: If the policy returns another number of scores, or one is not finite.
        """
        self._step += 1
        num_waiting = len(waiting)
        slots, features, arrival_s = self.rows.read(
            waiting, running, now_s, kv_cache_usage=kv_cache_usage, step_s=self._step_s
        )
        if self._policy.memory_size or num_waiting <= self._max_scored:
            scores = self._score(features, slots)
        else:
            scores = self._score_part(features, slots, num_waiting)
        # equal scores go by arrival, as in vLLM; NaN, a newcomer without a score yet, comes last
        order = np.lexsort((arrival_s, scores, features[:, IS_RUNNING]))
        return Ranking(slots, order, num_waiting)

    def _score(self, features: FloatArray, slots: IntArray) -> FloatArray:
        memory = self.rows.memory
        if self._policy.memory_size:
            kept = memory[slots]
            scores = self._policy.score(features, kept)
            memory[slots] = kept
        else:
            scores = self._policy.score(features, memory[: len(slots)])
        if scores.shape != slots.shape:
            raise InvalidScores(f"{len(slots)} requests got scores of shape {scores.shape}")
        if not math.isfinite(scores.sum()):
            raise InvalidScores("a score is not finite")
        return scores

    def _score_part(self, features: FloatArray, slots: IntArray, num_waiting: int) -> FloatArray:
        """Score the running and a part of the waiting; the others keep their last score."""
        chosen = self._choose(slots[:num_waiting])
        chosen = np.concatenate([chosen, np.arange(num_waiting, len(slots))])
        rows, some = self.rows, slots[chosen]
        rows.score[some] = self._score(features[chosen], some)
        rows.scored_step[some] = self._step
        return rows.score[slots]

    def _choose(self, slots: IntArray) -> IntArray:
        """Choose which of a long queue to score: newcomers, the best, and those due longest."""
        score = self.rows.score[slots]
        fresh = np.flatnonzero(np.isnan(score))[: self._max_scored]
        known = np.flatnonzero(~np.isnan(score))
        num_known = min(self._max_scored - len(fresh), len(known))
        if not num_known:
            return fresh
        half = num_known // 2
        best = known[np.argpartition(score[known], half)[:half]]
        due = known[np.argsort(self.rows.scored_step[slots[known]], kind="stable")]
        return np.unique(np.concatenate([fresh, best, due[: num_known - half]]))
