"""Search through assignments where requests or crashes couple the replicas: all are played.

A sweep plays the episode once, and at each of its decisions copies the whole fleet to play some
other choices to the end, everything else decided as before.
"""

from __future__ import annotations

from servegym.clairvoyant.copies import Words, copy_env
from servegym.clairvoyant.goal import Goal, is_better, loss, read_fates
from servegym.clairvoyant.replicas import REJECT
from servegym.cluster.jit import helper, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.rng import next_uniform
from servegym.cluster.state import DECISION, OBSERVED_OUTSTANDING, PLACE, Params, State
from servegym.typing import FloatArray, IntArray, UInt64Array

#: In an assignment: not known, as the request was not sent so often.
UNKNOWN = -2


@helper
def _column(p: Params, s: State, e: int) -> int:
    """Where an assignment has what is decided now, see `play_assigned`."""
    k = s.request[e, s.env[e].deciding].num_restarts
    if p.asks.place > 0:
        return 2 * k + (s.env[e].decision == PLACE)
    return k


@helper
def _answer(p: Params, s: State, e: int, choice: IntArray) -> int:
    """Action for the decision that is due: the one in the assignment, if it can be taken."""
    width = s.replica.shape[1]
    i = s.env[e].deciding
    k = _column(p, s, e)
    place = choice[i, k] if k < choice.shape[1] else UNKNOWN
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
            stands behind each dispatch. Where it says nothing that can be done, the replica with
            the fewest outstanding requests.

    Returns:
        `DONE`, or `LOG_FULL`: call again, with room.
    """
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason
        apply(p, s, e, _answer(p, s, e, choice))


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
        if i >= goal.first and k < choice.shape[1]:
            num_tries = int(tries + next_uniform(rng))
            for _ in range(num_tries):
                if spent[0] >= spent[1]:
                    return best
                place = int(next_uniform(rng) * (width + may_reject))
                place = REJECT if place == width else place
                old = choice[i, k]
                if place == old or (place >= 0 and (place == own or not s.allowed[0, place])):
                    continue
                choice[i, k] = place
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
                    choice[i, k] = old
        apply(p, s, 0, own)
    return best
