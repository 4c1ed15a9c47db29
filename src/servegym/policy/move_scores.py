"""Scores of who moves, and where: what a search gives weights to, in place of a rule of the core.

At each tick the replica with the highest score as a source gives a request to the one with the
highest score as a target, then the next two, as long as both are above their thresholds, as
Llumnix pairs by freeness alone. Whom it gives is the request with the highest score, waiting or
decoding, if that is above 0. With some weights this is Llumnix's rule, choice for choice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import helper, inlined
from servegym.cluster.pairing import freeness, is_up, may_come
from servegym.cluster.state import NOBODY, Params, State
from servegym.policy.contract import NO_BOUND
from servegym.policy.migrating import MigrationRule
from servegym.typing import FloatArray

#: What the weights of a replica are of, as a source and as a target. Sizes are logarithms.
REPLICA_TERMS = (
    "freeness",  # area hyperbolic sine of the free blocks per request, which may be below 0
    "waiting",  # requests in its queue
    "running",  # requests that run
    "coming",  # requests whose KV comes or has landed
    "head",  # blocks that the head of its queue needs
    "preempted",  # 1 if it has preempted since the last tick
)
#: And those of a request.
REQUEST_TERMS = (
    "constant",
    "behind",  # requests before it in the queue; 0 if it decodes
    "tokens",  # of its text so far
    "left",  # tokens it is predicted to have left
    "room",  # blocks it holds over those that are free where it goes, 4 at most
)
NUM_REPLICA_TERMS, NUM_REQUEST_TERMS = len(REPLICA_TERMS), len(REQUEST_TERMS)
#: Raised whenever a term changes.
MOVE_SCHEMA_VERSION = 1
#: Where the weights of a target, of who waits and of who decodes begin in the vector of all.
_TARGET = NUM_REPLICA_TERMS + 1
_WAITING = 2 * _TARGET
_DECODING = _WAITING + NUM_REQUEST_TERMS
NUM_MOVE_WEIGHTS = _DECODING + NUM_REQUEST_TERMS


class MoveWeights(NamedTuple):
    """What a search has found.

    Attributes:
        source: Weights of `REPLICA_TERMS`, then the threshold, `float64[NUM_REPLICA_TERMS + 1]`.
        target: The same of where a request goes.
        waiting: Weights of `REQUEST_TERMS` of who waits, `float64[NUM_REQUEST_TERMS]`.
        decoding: The same of who decodes.
    """

    source: FloatArray
    target: FloatArray
    waiting: FloatArray
    decoding: FloatArray

    @classmethod
    def of(cls, flat: FloatArray) -> MoveWeights:
        """Take them from one vector, `float64[NUM_MOVE_WEIGHTS]`."""
        return cls(*np.split(flat, (_TARGET, _WAITING, _DECODING)))


def by_freeness(source_below: float, target_above: float, *, waiting_first: bool) -> MoveWeights:
    """Return the weights with which Llumnix's rule is played.

    Args:
        source_below: As of the rule `freeness`.
        target_above: The same.
        waiting_first: Whether the head of the queue moves, if there is one, as under
            `freeness-waiting`; else the decoding request with the fewest tokens does.
    """
    source, target = np.zeros(_TARGET), np.zeros(_TARGET)
    source[0], source[-1] = -1.0, -math.asinh(source_below)
    target[0], target[-1] = 1.0, math.asinh(target_above)
    waiting, decoding = np.zeros(NUM_REQUEST_TERMS), np.zeros(NUM_REQUEST_TERMS)
    # any text is shorter than exp(15) tokens; the second of a queue has log(2) less than the head
    waiting[:2] = (16.0 if waiting_first else -16.0), -1.0
    decoding[0], decoding[2] = 15.0, -1.0
    return MoveWeights(source, target, waiting, decoding)


def scored_moves(weights: MoveWeights, name: str) -> MigrationRule:
    """Return the rule that goes by weights."""
    flat = np.ascontiguousarray(np.concatenate(weights), np.float64)
    return MigrationRule(name, information="predictive", weights=flat)


@inlined
def _replica_score(p: Params, s: State, e: int, r: int, w: FloatArray, first: int) -> float:
    """Score of a replica by the weights from `first` on, less the threshold behind them."""
    v = s.replica[e, r]
    free = min(NO_BOUND, freeness(p, s, e, r))
    score = w[first] * math.asinh(free) - w[first + NUM_REPLICA_TERMS]
    score += w[first + 1] * math.log(1.0 + v.num_waiting)
    score += w[first + 2] * math.log(1.0 + v.num_running)
    score += w[first + 3] * math.log(1.0 + s.link[e, r].num_remote)
    if v.num_waiting > 0:
        q = s.request[e, v.wait_head]
        blocks = (q.prompt + q.generated + p.block_size - 1) // p.block_size
        score += w[first + 4] * math.log(1.0 + blocks)
    return score + (w[first + 5] if s.move[e, r].lately > 0 else 0.0)


@inlined
def _request_score(
    p: Params, s: State, e: int, b: int, request: int, behind: int, new: int, w: FloatArray, at: int
) -> float:
    """Score of a request that would go to `b`; `new` tokens of it are not booked yet."""
    q = s.request[e, request]
    tokens = q.prompt + q.generated + new
    left = max(1.0, float(q.predicted - q.generated - new))
    held = (tokens + p.block_size - 1) // p.block_size
    room = min(4.0, held / (1.0 + s.replica[e, b].free_blocks))
    score = w[at] + w[at + 1] * math.log(1.0 + behind) + w[at + 2] * math.log(1.0 + tokens)
    return score + w[at + 3] * math.log(1.0 + left) + w[at + 4] * room


@helper
def _whom(p: Params, s: State, e: int, a: int, b: int, w: FloatArray) -> int:
    """Whom one replica gives to another, -1: nobody."""
    v = s.replica[e, a]
    found, best, behind = -1, 0.0, 0
    request = v.wait_head
    while request >= 0:
        if may_come(s, e, b, request):
            score = _request_score(p, s, e, b, request, behind, 0, w, _WAITING)
            if score > best:
                found, best = request, score
        behind += 1
        request = s.request[e, request].next_request
    request = v.run_head
    while request >= 0:
        q = s.request[e, request]
        if q.join_iter >= 0 and may_come(s, e, b, request):
            new = v.iteration - q.join_iter
            score = _request_score(p, s, e, b, request, 0, new, w, _DECODING)
            if score > best:
                found, best = request, score
        request = q.next_request
    return found


@helper
def choose_by_scores(p: Params, s: State, e: int, w: FloatArray) -> int:
    """Say who moves next at this tick, as an answer to `MIGRATE`.

    Args:
        p: Constants.
        s: State; whoever has had its turn at this tick is noted in it.
        e: Environment.
        w: Weights, `float64[NUM_MOVE_WEIGHTS]`.
    """
    while True:
        source, target, most, best = -1, -1, 0.0, 0.0
        for r in range(s.env[e].num_replicas):
            m = s.move[e, r]
            if not is_up(s, e, r) or m.paired > 0 or m.request >= 0:
                continue
            value = _replica_score(p, s, e, r, w, 0)
            if (value > 0.0 or m.lately > 0) and (source < 0 or value > most):
                source, most = r, value
        if source < 0:
            return NOBODY
        for r in range(s.env[e].num_replicas):
            m = s.move[e, r]
            if r == source or not is_up(s, e, r) or m.paired > 0 or m.lately > 0:
                continue
            value = _replica_score(p, s, e, r, w, _TARGET)
            if value > 0.0 and (target < 0 or value > best):
                target, best = r, value
        if target < 0:
            return NOBODY
        s.move[e, source].paired = 1
        request = _whom(p, s, e, source, target, w)
        if request >= 0:
            s.move[e, target].paired = 1
            return int(request * s.replica.shape[1] + target)
