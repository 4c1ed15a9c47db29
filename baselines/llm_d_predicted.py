"""llm-d's predicted latency: TTFT and TPOT by trees that learn from what has come.

For each replica, boosted trees predict a quantile of TTFT and of TPOT from what its engine reports:
KV use, waiting and running requests, and from the prompt's length and its cached share. Of replicas
that are within both limits, one is drawn, the more likely the less it has to spare, so that others
keep room for what comes; now and then another one, to learn. Where none is within, or there are no
limits, the lowest blend of both times is chosen. Before enough requests have ended, llm-d's usual
scorers decide.
"""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from servegym.baselines.boosted_trees import BoostedTrees, rehearse
from servegym.baselines.llm_d import llm_d
from servegym.policy.contract import (
    DECODE_STEP_S,
    KV_CACHE_USAGE,
    NUM_RUNNING,
    NUM_WAITING,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    TPOT_SLO_S,
    TTFT_SLO_S,
    Group,
)
from servegym.policy.online import Fared, Learner, OnlinePolicy
from servegym.policy.policy import Heuristic, Observations
from servegym.typing import BoolArray, FloatArray

#: Ended requests that are learned from, and how many new ones until models are learned anew.
_WINDOW, _EVERY = 2000, 200
#: How many must have ended before predictions are used.
_LEAST = 100
#: A limit of so many seconds is none.
_NO_LIMIT_S = 1e5
#: Times are learned as logarithms; none is taken to be shorter.
_SHORTEST_S = 1e-5
#: Largest over smallest weight of a draw by headroom.
_MOST = 100.0
_ENV = np.zeros(1, np.int64)


class _Window:
    """The latest samples of one kind, and the model of them."""

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._seen: list[FloatArray] = []
        self._log_s: list[float] = []
        self._new = 0
        self.model: BoostedTrees | None = None

    def add(self, seen: FloatArray, seconds: float) -> None:
        if np.isnan(seconds):
            return
        self._seen.append(seen)
        self._log_s.append(float(np.log(max(seconds, _SHORTEST_S))))
        self._new += 1
        known = self.model is not None
        if len(self._seen) < _LEAST or (known and self._new < _EVERY):
            return
        del self._seen[:-_WINDOW], self._log_s[:-_WINDOW]
        self.model = BoostedTrees.fit(
            np.array(self._seen), np.array(self._log_s), quantile=self._quantile
        )
        self._new = 0


class PredictedLatency(Learner):
    """The learner of one router.

    Args:
        params: Weight of TTFT in a blend and of TPOT; the quantile of both that is predicted; how
            much rather those with little to spare are chosen than those with much, 0 to 1; how
            often one that is not within its limits is chosen although others are; and whether the
            known speeds of replicas are features, too, from 0.5 on.
        seed: Of its draws.
    """

    def __init__(self, params: FloatArray, seed: int) -> None:
        ttft, tpot, quantile, self._least, self._explore, self._typed = params.tolist()
        self._blend = np.array([ttft, tpot])
        self._rng = np.random.default_rng(seed)
        self._usual: Heuristic = llm_d()
        self._usual.reset(1, seed)
        rehearse()
        self._ttft, self._tpot = _Window(quantile), _Window(quantile)

    def _features(self, replicas: FloatArray, request: FloatArray) -> FloatArray:
        width = replicas.shape[1]
        prompt = request[PROMPT_TOKENS]
        rows = [
            replicas[KV_CACHE_USAGE],
            replicas[NUM_WAITING],
            replicas[NUM_RUNNING],
            np.full(width, prompt),
            replicas[PREFIX_HIT_TOKENS] / prompt,
        ]
        if self._typed >= 0.5:
            rows += [replicas[PREFILL_TOKENS_PER_S], replicas[DECODE_STEP_S]]
        return np.ascontiguousarray(np.stack(rows, axis=1))

    @override
    def describe(self, replicas: FloatArray, request: FloatArray, r: int) -> FloatArray:
        return self._features(replicas[:, r : r + 1], request)[0]

    @override
    def learn_ttft(self, seen: FloatArray, ttft_s: float) -> None:
        self._ttft.add(seen, ttft_s)

    @override
    def learn(self, fared: Fared) -> None:
        self._tpot.add(fared.seen, fared.tpot_s)

    @override
    def decide(self, replicas: FloatArray, request: FloatArray, mask: BoolArray) -> int:
        if self._ttft.model is None or self._tpot.model is None:
            seen = Observations(replicas[None], request[None], mask[None])
            return int(self._usual.act(seen, _ENV)[0])
        allowed = np.flatnonzero(mask[:-2])
        x = self._features(replicas, request)[allowed]
        times = np.exp(np.stack([self._ttft.model.predict(x), self._tpot.model.predict(x)]))
        limits = np.array([request[TTFT_SLO_S], request[TPOT_SLO_S]])
        if (limits < _NO_LIMIT_S).any():
            spare = limits[:, None] - times
            within: BoolArray = np.all(spare > 0.0, axis=0)
            if within.any():
                return int(allowed[self._packed(spare, within)])
        cost = self._blend @ _spread(times)
        best = np.flatnonzero(cost == cost.min())
        return int(allowed[self._rng.choice(best)])

    def _packed(self, spare: FloatArray, within: BoolArray) -> int:
        """Draw one that is within its limits, rather one with little to spare."""
        others = np.flatnonzero(~within)
        if len(others) and self._rng.random() < self._explore:
            return int(self._rng.choice(others))
        good = np.flatnonzero(within)
        room = self._blend @ _spread(spare[:, good])
        least = self._least
        odds = 1.0 + (_MOST - 1.0) * (least * (room.max() - room) + (1.0 - least) * room)
        return int(self._rng.choice(good, p=odds / odds.sum()))


def _spread(values: FloatArray) -> FloatArray:
    """Return each row between 0, its least value, and 1, its largest; 0 where all are the same."""
    low = values.min(axis=1, keepdims=True)
    width = values.max(axis=1, keepdims=True) - low
    return (values - low) / np.where(width > 0.0, width, 1.0)


def llm_d_predicted(
    ttft: float = 0.8,
    tpot: float = 0.2,
    quantile: float = 0.9,
    least: float = 1.0,
    explore: float = 0.01,
    typed: float = 0.0,
) -> OnlinePolicy:
    """llm-d's predicted latency: TTFT and TPOT by trees that learn while serving."""
    return OnlinePolicy(
        name="llm-d-predicted",
        information="metric",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX,
        make_learner=PredictedLatency,
        params=np.array([ttft, tpot, quantile, least, explore, typed], np.float64),
        param_names=("ttft", "tpot", "quantile", "least", "explore", "typed"),
        reference="llm-d inference scheduler, predicted latency",
    )
