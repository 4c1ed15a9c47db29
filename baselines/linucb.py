"""LinUCB: a linear bandit over what a choice looks like, learned from how ended requests fared.

The cost of a choice is the request's latency over what it would be alone on the fastest replica,
as predicted. It is linear in what is seen of the replica and the request, with one set of weights
for all replicas, by ridge regression that forgets; a choice that has been tried little gets the
benefit of the doubt (Li et al. 2010, with shared weights).
"""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    KV_CACHE_USAGE,
    MAX_NUM_SEQS,
    NUM_WAITING,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    Group,
)
from servegym.policy.costs import delay_s, step_s
from servegym.policy.online import Fared, Learner, OnlinePolicy
from servegym.typing import BoolArray, FloatArray

_NUM_TERMS = 8
#: Weight of the prior that a request takes as long as it would with those who are there.
_PRIOR = 20.0


class LinearBandit(Learner):
    """The learner of one router.

    Args:
        params: How much a choice gets for being little known; ended requests until what was
            learned counts a third; and the price of the delay of others, which no latency of the
            request itself shows.
        seed: Of draws among equals.
    """

    def __init__(self, params: FloatArray, seed: int) -> None:
        self._alpha, self._memory, self._price = params.tolist()
        self._rng = np.random.default_rng(seed)
        self._gram = _PRIOR * np.eye(_NUM_TERMS)
        # own wait, prefill and decode count as they are, until something else is seen
        prior = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
        self._moment = self._gram @ prior
        self._inverse, self._weights = np.linalg.inv(self._gram), prior

    def _terms(
        self, replicas: FloatArray, request: FloatArray
    ) -> tuple[FloatArray, FloatArray, float]:
        """Return what choices look like.

        Returns:
            What a request's own latency depends on, `float64[R, _NUM_TERMS]`; seconds by which it
            delays others, over its latency alone, `float64[R]`; and that latency.
        """
        prompt, tokens = request[PROMPT_TOKENS], request[PREDICTED_OUTPUT_TOKENS]
        rate, seq_s = replicas[PREFILL_TOKENS_PER_S], replicas[DECODE_SEQ_S]
        others = replicas[OUTSTANDING_REQUESTS]
        new_s = np.maximum(prompt - replicas[PREFIX_HIT_TOKENS], 0.0) / rate
        each_s = step_s(replicas[DECODE_STEP_S], seq_s, others)
        alone_s = float((prompt / rate + tokens * replicas[DECODE_STEP_S]).min())
        terms = np.stack(
            [
                np.ones(len(others)),
                replicas[PENDING_PREFILL_TOKENS] / rate / alone_s,
                new_s / alone_s,
                tokens * each_s / alone_s,
                replicas[KV_CACHE_USAGE],
                replicas[KV_CACHE_USAGE] ** 4,
                others / replicas[MAX_NUM_SEQS],
                np.log1p(replicas[NUM_WAITING]),
            ],
            axis=1,
        )
        return terms, delay_s(others, new_s, seq_s, tokens) / alone_s, alone_s

    @override
    def describe(self, replicas: FloatArray, request: FloatArray, r: int) -> FloatArray:
        terms, _, alone_s = self._terms(replicas, request)
        return np.append(terms[r], alone_s)

    @override
    def learn_ttft(self, seen: FloatArray, ttft_s: float) -> None:
        """Do nothing: what counts is the whole latency."""

    @override
    def learn(self, fared: Fared) -> None:
        terms, alone_s = fared.seen[:-1], fared.seen[-1]
        kept = 1.0 - 1.0 / self._memory
        self._gram = kept * self._gram + np.outer(terms, terms) + (1.0 - kept) * np.eye(_NUM_TERMS)
        self._moment = kept * self._moment + terms * (fared.e2e_s / alone_s)
        self._inverse = np.linalg.inv(self._gram)
        self._weights = self._inverse @ self._moment

    @override
    def decide(self, replicas: FloatArray, request: FloatArray, mask: BoolArray) -> int:
        allowed = np.flatnonzero(mask[:-2])
        terms, delays, _ = self._terms(replicas, request)
        terms = terms[allowed]
        doubt = np.sqrt(np.einsum("ij,jk,ik->i", terms, self._inverse, terms))
        cost = terms @ self._weights - self._alpha * doubt + self._price * delays[allowed]
        best = np.flatnonzero(cost == cost.min())
        return int(allowed[self._rng.choice(best)])


def linucb(alpha: float = 0.3, memory: float = 2000.0, price: float = 1.0) -> OnlinePolicy:
    """Contextual bandit: a linear latency that is learned while serving, with doubt's benefit."""
    return OnlinePolicy(
        name="linucb",
        information="predictive",
        needs=Group.COUNTERS | Group.METRICS | Group.PREFIX,
        make_learner=LinearBandit,
        params=np.array([alpha, memory, price], np.float64),
        param_names=("alpha", "memory", "price"),
        reference="LinUCB (Li et al. 2010), shared weights, delays of others priced",
    )
