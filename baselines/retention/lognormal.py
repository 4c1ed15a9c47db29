"""Turns are kept as long as those like them took to come back, if that is not long."""

from __future__ import annotations

import math
from statistics import NormalDist

from servegym.cluster.state import KEEP, LEAVE, OFFLOAD
from servegym.policy.retention import RetentionRule, Turn
from servegym.policy.turn_scores import FIRST_GUESS_S, LEAST_GAPS, gap_logs


def lognormal(quantile: float = 0.9, most: float = 60.0) -> RetentionRule:
    """Keep a turn until a quantile of log-normal gaps fitted to those seen, unless that is long."""
    z = NormalDist().inv_cdf(min(max(quantile, 1e-6), 1.0 - 1e-6))

    def retain(turn: Turn) -> tuple[int, float]:
        keep_s = FIRST_GUESS_S
        if len(turn.gaps_s) >= LEAST_GAPS:
            mean, spread = gap_logs(turn.gaps_s)
            keep_s = math.exp(min(50.0, mean + z * spread))
        if keep_s <= most:
            return KEEP, keep_s
        return (OFFLOAD if turn.tiered else LEAVE), 0.0

    return RetentionRule("lognormal", "predictive", retain, "llm-d-router#2928: log-normal gaps")
