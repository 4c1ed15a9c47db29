"""Search through assignments where requests or crashes couple the replicas: all are played.

A sweep plays the episode once, and at each of its decisions copies the whole fleet to play some
other choices to the end, everything else decided as before.
"""

from __future__ import annotations

from servegym.clairvoyant.copies import Words, copy_env
from servegym.clairvoyant.goal import Goal, is_better, loss, read_fates
from servegym.clairvoyant.replicas import REJECT
from servegym.cluster.jit import helper, inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.rng import next_uniform
from servegym.cluster.state import (
    DECISION,
    DISPATCH,
    OBSERVED_OUTSTANDING,
    PLACE,
    Params,
    State,
)
from servegym.typing import FloatArray, IntArray, UInt64Array

#: In an assignment: not known, as the request was not sent so often.
UNKNOWN = -2
#: How another choice differs, where a router may hold requests: each as often as the others.
_PLACE_OTHERWISE, _HOLD_OTHERWISE, _BOTH_OTHERWISE = range(3)
#: A request is held longer or less long by up to so many holds.
MOST_HOLDS = 64.0


@inlined
def _num_columns(p: Params) -> int:
    """How many columns of an assignment tell of one dispatch, see `play_assigned`."""
    return 1 + (p.asks.place > 0) + p.allow_hold


@helper
def _column(p: Params, s: State, e: int) -> int:
    """Where an assignment has the replica that is decided now, see `play_assigned`."""
    k = s.request[e, s.env[e].deciding].num_restarts
    return _num_columns(p) * k + (s.env[e].decision == PLACE)


@helper
def _holds_column(p: Params, s: State, e: int) -> int:
    """Where an assignment has how often the request that is decided about is held."""
    return _num_columns(p) * (s.request[e, s.env[e].deciding].num_restarts + 1) - 1


@helper
def _is_held_on(p: Params, s: State, e: int, choice: IntArray) -> bool:
    """Whether the request that is decided about comes from a hold."""
    if not p.allow_hold or s.env[e].decision != DISPATCH:
        return False
    q = s.request[e, s.env[e].deciding]
    before = 0  # holds up to its last dispatch, if a crash brought it back
    if q.num_restarts > 0:
        before = choice[s.env[e].deciding, _num_columns(p) * q.num_restarts - 1]
    return q.num_holds > before


@helper
def _answer(p: Params, s: State, e: int, choice: IntArray) -> int:
    """Action for the decision that is due: the one in the assignment, if it can be taken."""
    width = s.replica.shape[1]
    i = s.env[e].deciding
    k = _column(p, s, e)
    is_known = k < choice.shape[1]
    if is_known and p.allow_hold and s.env[e].decision == DISPATCH and s.allowed[e, width]:
        if s.request[e, i].num_holds < choice[i, _holds_column(p, s, e)]:
            return width
    place = choice[i, k] if is_known else UNKNOWN
    if place == REJECT and s.allowed[e, width + 1]:
        return width + 1
    if place >= 0 and s.allowed[e, place]:
        return place
    best = -1
    for r in range(s.env[e].num_replicas):
        if s.allowed[e, r] and (
            best < 0
            or s.observation[e, OBSERVED_OUTSTANDING, r]
            < s.observation[e, OBSERVED_OUTSTANDING, best]
        ):
            best = r
    return best


@kernel
def play_assigned(p: Params, s: State, e: int, choice: IntArray) -> int:
    """Play one environment on under an assignment.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        choice: Replica of each request, or `REJECT`, at its first dispatch and at those after
            crashes, `int64[N, K]`; where it is asked where requests decode, the answer to that
            stands behind each dispatch, and where requests may be held, how often a request was
            held before it was sent, since its arrival. Where it says nothing that can be done, the
            replica with the fewest outstanding requests.

    Returns:
        `DONE`, or `LOG_FULL`: call again, with room.
    """
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason
        apply(p, s, e, _answer(p, s, e, choice))


@helper
def _other_holds(so_far: int, old: int, rng: UInt64Array) -> int:
    """Draw how often a request is held instead; small changes are as likely as large ones."""
    step = int(MOST_HOLDS ** next_uniform(rng))
    if next_uniform(rng) < 0.5:
        step = -step
    return max(so_far, max(so_far, old) + step)


@kernel
def sweep_fleet(
    goal: Goal,
    p: Params,
    s: State,
    words: Words,
    choice: IntArray,
    fates: FloatArray,
    room: FloatArray,
    tries: float,
    may_reject: bool,
    rng: UInt64Array,
    spent: IntArray,
) -> tuple[float, float]:
    """Try other choices at every decision of an episode, and keep what is better.

    Args:
        goal: What counts; requests that are not judged stay where they are.
        p: Constants.
        s: Two environments, the first one at the beginning of the episode.
        words: The same as numbers.
        choice: The assignment, see `play_assigned`; written in place.
        fates: Working memory, `float64[NUM_FATES, N]`.
        room: Working memory, `float64[N]`.
        tries: Other choices tried at a decision, on average.
        may_reject: Whether to reject is one of them.
        rng: Which ones, `uint64[1]`.
        spent: Requests played so far, the most that may be, changes made, `int64[3]`.

    Returns:
        Loss of the whole episode under the assignment.
    """
    width = s.env[0].num_replicas
    num_requests = choice.shape[0]
    copy_env(s, words, 0, 1, 0)
    play_assigned(p, s, 1, choice)
    read_fates(s, 1, fates)
    best = loss(goal, fates, room)
    spent[0] += num_requests
    while advance(p, s, 0) == DECISION:
        i = s.env[0].deciding
        k = _column(p, s, 0)
        own = _answer(p, s, 0, choice)
        if i >= goal.first and k < choice.shape[1] and not _is_held_on(p, s, 0, choice):
            num_tries = int(tries + next_uniform(rng))
            for _ in range(num_tries):
                if spent[0] >= spent[1]:
                    return best
                place, column, holds = choice[i, k], k, 0
                changes = _PLACE_OTHERWISE
                if p.allow_hold and s.env[0].decision == DISPATCH:
                    column = _holds_column(p, s, 0)
                    holds = choice[i, column]
                    changes = int(next_uniform(rng) * (_BOTH_OTHERWISE + 1))
                if changes != _HOLD_OTHERWISE:
                    other = int(next_uniform(rng) * (width + may_reject))
                    other = REJECT if other == width else other
                    if other == place:
                        continue
                    if other >= 0 and (other == own or not s.allowed[0, other]):
                        continue
                    choice[i, k] = other
                if changes != _PLACE_OTHERWISE:
                    choice[i, column] = _other_holds(s.request[0, i].num_holds, holds, rng)
                copy_env(s, words, 0, 1, 0)
                left = num_requests - s.env[1].num_ended
                play_assigned(p, s, 1, choice)
                spent[0] += left
                read_fates(s, 1, fates)
                found = loss(goal, fates, room)
                if is_better(found, best):
                    best = found
                    own = _answer(p, s, 0, choice)
                    spent[2] += 1
                else:
                    choice[i, k] = place
                    if changes != _PLACE_OTHERWISE:
                        choice[i, column] = holds
        apply(p, s, 0, own)
    return best
