"""Shortest predicted time per output token: of a step that decodes one request more."""

from __future__ import annotations

from servegym.baselines.choice import better, no_replica, num_replicas
from servegym.policy.contract import DECODE_SEQ_S, DECODE_STEP_S, OUTSTANDING_REQUESTS, Group
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
    best, best_cost = -1, 0.0
    for r in range(num_replicas(mask)):
        if mask[r]:
            others = replicas[OUTSTANDING_REQUESTS, r]
            cost = step_s(replicas[DECODE_STEP_S, r], replicas[DECODE_SEQ_S, r], others)
            if better(cost, r, best_cost, best):
                best, best_cost = r, cost
    return best if best >= 0 else no_replica(mask)


def least_tpot() -> Heuristic:
    """Shortest predicted time per output token: of a step that decodes one request more."""
    return Heuristic(
        name="least-tpot",
        information="metric",
        needs=Group.COUNTERS,
        decide=decide,
        reference="Mooncake (FAST'25), choice of the decode instance",
    )
