"""From the scores of a policy to places in the queue and among the victims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from servegym.errors import ServeGymError
from servegym.policy.ordering import OrderingPolicy
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.rows import RequestRows
from servegym.typing import FloatArray, IntArray

#: Weight of the newest step in the average step time.
_STEP_WEIGHT = 0.05


class Ranking(NamedTuple):
    """How a policy orders the requests of a step.

    Attributes:
        admission: Indices of the waiting requests, the first to be admitted first, `int64[w]`.
        eviction: Indices of the running ones, the first to be preempted last, `int64[r]`.
    """

    admission: IntArray
    eviction: IntArray


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
        """Order the requests.

        Args:
            waiting: Requests in the waiting queue, in any order.
            running: Requests in the running list.
            now_s: Same clock as their arrival times.
            kv_cache_usage: Share of KV blocks held.

        Returns:
            The order; `rows.rank` holds each request's place in it.

        Raises:
            InvalidScores: If the policy returns another number of scores, or one is not finite.
        """
        self._step += 1
        rows, num_waiting = self.rows, len(waiting)
        slots = rows.slots([*waiting, *running])
        features = rows.features(
            waiting, running, slots, now_s, kv_cache_usage=kv_cache_usage, step_s=self._step_s
        )
        if self._policy.memory_size or num_waiting <= self._max_scored:
            self._score(features, slots)
        else:
            chosen = self._choose(slots[:num_waiting])
            chosen = np.concatenate([chosen, np.arange(num_waiting, len(slots))])
            self._score(features[chosen], slots[chosen])
        # NaN, a newcomer that was not scored yet, is sorted last
        order = Ranking(self._sorted(slots[:num_waiting]), self._sorted(slots[num_waiting:]))
        rows.rank[slots[order.admission]] = np.arange(num_waiting)
        rows.rank[slots[num_waiting:][order.eviction]] = np.arange(len(running))
        return order

    def _score(self, features: FloatArray, slots: IntArray) -> None:
        memory = self.rows.memory[slots]
        scores = self._policy.score(features, memory)
        if scores.shape != slots.shape:
            raise InvalidScores(f"{len(slots)} requests got scores of shape {scores.shape}")
        if not np.isfinite(scores).all():
            raise InvalidScores("a score is not finite")
        self.rows.memory[slots] = memory
        self.rows.score[slots] = scores
        self.rows.scored_step[slots] = self._step

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

    def _sorted(self, slots: IntArray) -> IntArray:
        """Sort by score, equal ones by arrival."""
        order: IntArray = np.lexsort((self.rows.arrival_s(slots), self.rows.score[slots]))
        return order
