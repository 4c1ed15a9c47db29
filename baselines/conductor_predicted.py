"""Mooncake's Conductor, rejecting early by the decode load that there will be after the prefill.

Early rejection looks at the decode load of now and is one prefill too late: it lets in and rejects
in turns. Here the load is predicted for the time at which the request would begin to decode: of
what decodes now a part will have ended, all decodes taking the same time, and what is prefilled by
then elsewhere will have come, in equal parts to all that decode.
"""

from __future__ import annotations

import numpy as np

from servegym.baselines.choice import no_replica, num_replicas
from servegym.baselines.conductor import NO_DECODER_S, rejected, shortest_ttft
from servegym.policy.contract import (
    DECODE_SEQ_S,
    DECODE_STEP_S,
    DECODES,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREFILL_TOKENS_PER_S,
    UP,
    Group,
)
from servegym.policy.costs import step_s
from servegym.policy.policy import Heuristic
from servegym.policy.rule import rule
from servegym.typing import BoolArray, FloatArray, UInt64Array


@rule
def decide(
    replicas: FloatArray,
    request: FloatArray,
    mask: BoolArray,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Decide; see `policy.rule`."""
    best, then_s = shortest_ttft(replicas, request, mask, 0.0)
    if best < 0:
        return no_replica(mask)
    reject = num_replicas(mask) + 1
    if not mask[reject]:
        return best
    stays = max(0.0, 1.0 - then_s / params[1])
    if replicas[DECODES, best] > 0.5:  # it does all of the request
        others = replicas[OUTSTANDING_REQUESTS, best] * stays
        tpot_s = step_s(replicas[DECODE_STEP_S, best], replicas[DECODE_SEQ_S, best], others)
        return reject if rejected(request, params[0], then_s, tpot_s) else best
    come, decoders = 0.0, 0
    for r in range(num_replicas(mask)):
        if replicas[UP, r] > 0.0 and replicas[DECODES, r] > 0.5:
            decoders += 1
        elif replicas[UP, r] > 0.0:
            all_s = replicas[PENDING_PREFILL_TOKENS, r] / replicas[PREFILL_TOKENS_PER_S, r]
            share = 1.0 if all_s <= then_s else then_s / all_s
            come += share * replicas[OUTSTANDING_REQUESTS, r]
    tpot_s = NO_DECODER_S
    for r in range(num_replicas(mask)):
        if replicas[UP, r] > 0.0 and replicas[DECODES, r] > 0.5:
            others = replicas[OUTSTANDING_REQUESTS, r] * stays + come / decoders
            each_s = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
            tpot_s = min(tpot_s, each_s)
    return reject if rejected(request, params[0], then_s, tpot_s) else best


def conductor_predicted(slack: float = 1.0, decode_s: float = 5.0) -> Heuristic:
    """Mooncake's Conductor, rejecting early by the decode load that there will be."""
    return Heuristic(
        name="conductor-predicted",
        information="metric",
        needs=Group.COUNTERS | Group.PREFIX | Group.ROLES,
        decide=decide,
        params=np.array([slack, decode_s], np.float64),
        param_names=("slack", "decode_s"),
        reference="Mooncake, early rejection based on prediction; without fetching prefixes",
    )
