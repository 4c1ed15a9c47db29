"""What the controller of a fleet sees and may do: which request moves to another replica."""

from __future__ import annotations

from numba import types

from servegym.cluster.entry import ANSWER_MOVE, SEE_MOVES, entry
from servegym.cluster.jit import kernel
from servegym.cluster.pairing import NO_MOVE, choose_move, freeness, is_up, victim
from servegym.cluster.state import NOBODY, QUEUED, Params, State
from servegym.policy.contract import NO_BOUND, Feature, Group
from servegym.typing import Float32Array, Int8Array

#: Of each replica, as its engine is when the controller is asked.
MOVE_FEATURES = (
    Feature("free_blocks", 0, NO_BOUND, "blocks", Group.METRICS, "KV that no request holds"),
    Feature(
        "freeness",
        -NO_BOUND,
        NO_BOUND,
        "blocks",
        Group.METRICS,
        "free blocks less those the head of the queue needs, per request; 1e9 without any",
    ),
    Feature("num_running", 0, NO_BOUND, "requests", Group.METRICS, "in the running list"),
    Feature("num_waiting", 0, NO_BOUND, "requests", Group.METRICS, "in the queue"),
    Feature(
        "head_blocks", 0, NO_BOUND, "blocks", Group.METRICS, "that the head of the queue needs"
    ),
    Feature("num_coming", 0, NO_BOUND, "requests", Group.METRICS, "whose KV comes or has landed"),
    Feature("is_sending", 0, 1, "-", Group.METRICS, "1 if a request is moving away from it"),
    Feature(
        "has_preempted", 0, 1, "-", Group.METRICS, "1 if it preempted one since the last decision"
    ),
    Feature(
        "moving_tokens",
        0,
        NO_BOUND,
        "tokens",
        Group.METRICS,
        "prompt and output so far of whom it would give away; 0: nobody",
    ),
    Feature("moving_waits", 0, 1, "-", Group.METRICS, "1 if that one waits: it has no KV"),
)


def num_pairs(width: int) -> int:
    """Return the actions of a controller: every replica to every other one, and nobody."""
    return width * width + 1


@entry(
    SEE_MOVES,
    types.void,
    types.int64,
    types.float32[:, ::1],
    types.int8[::1],
    types.int64,
)
def see_moves(
    p: Params, s: State, e: int, moves: Float32Array, allowed: Int8Array, first: int
) -> None:
    """Write what a controller sees and may do.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        moves: Is given a row for each replica, `float32[R, len(MOVE_FEATURES)]`.
        allowed: Is given 1 for each action that may be chosen, `int8[first + num_pairs(R)]`:
            behind the first ones pairs, `source * R + target`, then nobody.
        first: Actions of others.
    """
    width = moves.shape[0]
    moves[:] = 0.0
    allowed[first:] = 0
    allowed[first + width * width] = 1
    for a in range(s.env[e].num_replicas):
        v, m = s.replica[e, a], s.move[e, a]
        if not is_up(s, e, a):
            continue
        moves[a, 0] = v.free_blocks
        moves[a, 1] = min(NO_BOUND, freeness(p, s, e, a))
        moves[a, 2] = v.num_running
        moves[a, 3] = v.num_waiting
        if v.num_waiting > 0:
            q = s.request[e, v.wait_head]
            moves[a, 4] = (q.prompt + q.generated + p.block_size - 1) // p.block_size
        moves[a, 5] = s.link[e, a].num_remote
        moves[a, 6] = m.request >= 0
        moves[a, 7] = m.lately
        if m.request >= 0 or m.paired > 0:
            continue
        for b in range(s.env[e].num_replicas):
            request = victim(p, s, e, a, b) if a != b and is_up(s, e, b) else -1
            if request >= 0:
                allowed[first + a * width + b] = 1
                q = s.request[e, request]
                moves[a, 8] = q.prompt + q.generated
                if q.status == QUEUED:
                    moves[a, 9] = 1.0
                elif q.join_iter >= 0:
                    moves[a, 8] += v.iteration - q.join_iter


@entry(ANSWER_MOVE, types.int64, types.int64, types.int64, types.int64)
def answer_move(p: Params, s: State, e: int, width: int, pair: int) -> int:
    """Return the core's answer for an action of a controller with `width` replica rows."""
    if pair == width * width:
        return NOBODY
    target = pair % width
    return victim(p, s, e, pair // width, target) * s.replica.shape[1] + target


@kernel
def rule_pair(p: Params, s: State, e: int, width: int) -> int:
    """Return the action that the rule of the cluster takes; it must be taken then."""
    answer = choose_move(p, s, e)
    if answer == NO_MOVE:
        return width * width
    columns = s.replica.shape[1]
    return s.request[e, answer // columns].replica * width + answer % columns
