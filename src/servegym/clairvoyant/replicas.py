"""Search through assignments where each replica can be played alone.

Where no request waits for another and no replica crashes, what a replica does depends on the
requests it gets and on nothing else: to move a request is to play two replicas, and the others stay
as they are. A sweep goes through the requests in order of arrival with every replica halted just
before the one in question, so that only what comes after the change is played.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.clairvoyant.copies import Words, copy_env
from servegym.clairvoyant.goal import FINISH, FIRST_TOKEN, SERVED, Goal, is_better, loss
from servegym.cluster.emission import next_with
from servegym.cluster.jit import helper, inlined, kernel
from servegym.cluster.kernels import advance, apply, reset_env
from servegym.cluster.rng import next_uniform
from servegym.cluster.state import FINISHED, Params, State
from servegym.typing import BoolArray, FloatArray, IntArray, UInt64Array
from servegym.workloads.table import BY_ITSELF

#: In `State.request`, field `after`: goes elsewhere. Nobody comes after such an end.
ELSEWHERE = -3
#: In an assignment: the request is rejected.
REJECT = -1


class Fleet(NamedTuple):
    """Replicas as environments of their own; axes: N requests, R replicas.

    Environment r of the state is replica r, halted; R and R + 1 are for trying.
    """

    ask: Params  # halts at every arrival
    play: Params  # never halts
    arrival_s: FloatArray  # [N]
    fits: BoolArray  # [N, R] whether a replica can take a request
    may_reject: bool


class Tried(NamedTuple):
    """Fates of all requests, `float64[NUM_FATES, N]`, and working memory, `float64[N]`."""

    now: FloatArray  # under the assignment so far
    without: FloatArray  # if the request in question were nowhere
    trial: FloatArray
    best: FloatArray
    room: FloatArray


class Effort(NamedTuple):
    """What a sweep may do, and what it did."""

    num_swaps: int  # exchanges tried with each request
    window: int  # with how many of the next ones
    rng: UInt64Array  # [1]
    spent: IntArray  # [3] requests played, the most that may be, changes made


@helper
def _halt_all(fleet: Fleet, s: State, assignment: IntArray) -> None:
    """Put all replicas at the beginning of the episode."""
    for r in range(fleet.fits.shape[1]):
        members = 0
        for i in range(assignment.shape[0]):
            member = assignment[i] == r
            s.request[r, i].after = BY_ITSELF if member else ELSEWHERE
            members += member
        reset_env(fleet.ask, s, r)
        for i in range(assignment.shape[0]):
            s.request[r, i].arrival_s = fleet.arrival_s[i]
        s.env[r].num_ended = assignment.shape[0] - members
        s.env[r].next_arrival = next_with(s, r, 0, BY_ITSELF)


@inlined
def _take_out(s: State, e: int, i: int) -> None:
    """Let a request go elsewhere that has not yet arrived."""
    s.request[e, i].after = ELSEWHERE
    s.env[e].num_ended += 1
    if s.env[e].next_arrival == i:
        s.env[e].next_arrival = next_with(s, e, i + 1, BY_ITSELF)


@inlined
def _put_in(s: State, e: int, i: int) -> None:
    """Let a request come that would have gone elsewhere."""
    s.request[e, i].after = BY_ITSELF
    s.env[e].num_ended -= 1
    s.env[e].next_arrival = min(s.env[e].next_arrival, i)


@helper
def _oldest(s: State, r: int, i: int, oldest: int) -> int:
    """First request of a halted replica, from `oldest` on, that has not ended; `i` at most."""
    while oldest < i:
        q = s.request[r, oldest]
        if q.after == BY_ITSELF and q.status != FINISHED:
            break
        oldest += 1
    return oldest


@helper
def _play_out(
    fleet: Fleet, s: State, e: int, first: int, fates: FloatArray, effort: Effort
) -> None:
    """Play a replica to its end and write what became of its requests."""
    advance(fleet.play, s, e)
    for i in range(first, fates.shape[1]):
        q = s.request[e, i]
        if q.after == BY_ITSELF:
            fates[FIRST_TOKEN, i] = q.first_token_s
            fates[FINISH, i] = q.finish_s
            fates[SERVED, i] = 1.0
            effort.spent[0] += 1


@inlined
def _take_back(s: State, e: int, first: int, source: FloatArray, target: FloatArray) -> None:
    """Make the fates of the requests of a replica again what they were."""
    for i in range(first, target.shape[1]):
        if s.request[e, i].after == BY_ITSELF:
            for k in range(target.shape[0]):
                target[k, i] = source[k, i]


@inlined
def _copy(source: FloatArray, target: FloatArray) -> None:
    for k in range(target.shape[0]):
        for i in range(target.shape[1]):
            target[k, i] = source[k, i]


@helper
def _best_place(
    goal: Goal,
    fleet: Fleet,
    s: State,
    words: Words,
    i: int,
    oldest: IntArray,
    assignment: IntArray,
    tried: Tried,
    effort: Effort,
    best: tuple[float, float],
) -> int:
    """Find where a request is best; the fates are then in `tried.best`.

    Returns:
        A replica, `REJECT`, or the number of replicas if it is best where it is.
    """
    width = fleet.fits.shape[1]
    home, place = assignment[i], width
    _copy(tried.now, tried.without)
    if home >= 0:
        copy_env(s, words, home, width, oldest[home])
        _take_out(s, width, i)
        tried.without[SERVED, i] = 0.0
        tried.without[FINISH, i] = fleet.arrival_s[i]
        _play_out(fleet, s, width, oldest[home], tried.without, effort)
        if fleet.may_reject:
            found = loss(goal, tried.without, tried.room)
            if is_better(found, best):
                best, place = found, REJECT
                _copy(tried.without, tried.best)
    _copy(tried.without, tried.trial)
    for r in range(width):
        if r == home or not fleet.fits[i, r]:
            continue
        copy_env(s, words, r, width + 1, oldest[r])
        _put_in(s, width + 1, i)
        _play_out(fleet, s, width + 1, oldest[r], tried.trial, effort)
        found = loss(goal, tried.trial, tried.room)
        if is_better(found, best):
            best, place = found, r
            _copy(tried.trial, tried.best)
        _take_back(s, width + 1, oldest[r], tried.without, tried.trial)
    return place


@helper
def _swap(
    goal: Goal,
    fleet: Fleet,
    s: State,
    words: Words,
    i: int,
    j: int,
    oldest: IntArray,
    assignment: IntArray,
    tried: Tried,
    effort: Effort,
) -> bool:
    """Let two requests change places if that is better."""
    width = fleet.fits.shape[1]
    home, other = assignment[i], assignment[j]
    _copy(tried.now, tried.trial)
    copy_env(s, words, home, width, oldest[home])
    _take_out(s, width, i)
    _put_in(s, width, j)
    _play_out(fleet, s, width, oldest[home], tried.trial, effort)
    copy_env(s, words, other, width, oldest[other])
    _take_out(s, width, j)
    _put_in(s, width, i)
    _play_out(fleet, s, width, oldest[other], tried.trial, effort)
    if not is_better(loss(goal, tried.trial, tried.room), loss(goal, tried.now, tried.room)):
        return False
    _take_out(s, home, i)
    _put_in(s, home, j)
    _take_out(s, other, j)
    _put_in(s, other, i)
    assignment[i], assignment[j] = other, home
    _copy(tried.trial, tried.now)
    return True


@helper
def _swap_some(
    goal: Goal,
    fleet: Fleet,
    s: State,
    words: Words,
    i: int,
    oldest: IntArray,
    assignment: IntArray,
    tried: Tried,
    effort: Effort,
) -> None:
    for _ in range(effort.num_swaps):
        j = i + 1 + int(next_uniform(effort.rng) * effort.window)
        if j >= assignment.shape[0] or assignment[i] < 0 or assignment[j] < 0:
            continue
        if assignment[i] == assignment[j]:
            continue
        if fleet.fits[i, assignment[j]] and fleet.fits[j, assignment[i]]:
            effort.spent[2] += _swap(goal, fleet, s, words, i, j, oldest, assignment, tried, effort)


@kernel
def play_all(
    fleet: Fleet, s: State, words: Words, assignment: IntArray, tried: Tried, effort: Effort
) -> None:
    """Write the fates of all requests under an assignment into `tried.now`."""
    _halt_all(fleet, s, assignment)
    for i in range(assignment.shape[0]):
        tried.now[0, i] = fleet.arrival_s[i]
        tried.now[SERVED, i] = 0.0
    for r in range(fleet.fits.shape[1]):
        copy_env(s, words, r, fleet.fits.shape[1], 0)
        _play_out(fleet, s, fleet.fits.shape[1], 0, tried.now, effort)


@kernel
def sweep(
    goal: Goal,
    fleet: Fleet,
    s: State,
    words: Words,
    assignment: IntArray,
    oldest: IntArray,
    tried: Tried,
    effort: Effort,
) -> None:
    """Try every request everywhere, one after the other, and keep what is better.

    Args:
        goal: What counts; requests that are not judged stay where they are.
        fleet: The replicas.
        s: Their state, `num_replicas + 2` environments.
        words: The same as numbers.
        assignment: Replica of each request or `REJECT`, `int64[N]`; written in place.
        oldest: Working memory, `int64[R]`.
        tried: `now` holds the fates under the assignment, before and after.
        effort: What may be done.
    """
    _halt_all(fleet, s, assignment)
    oldest[:] = 0
    for i in range(assignment.shape[0]):
        if i >= goal.first:
            if effort.spent[0] >= effort.spent[1]:
                return
            for r in range(fleet.fits.shape[1]):
                oldest[r] = _oldest(s, r, i, oldest[r])
            best = loss(goal, tried.now, tried.room)
            place = _best_place(goal, fleet, s, words, i, oldest, assignment, tried, effort, best)
            if place < fleet.fits.shape[1]:
                if assignment[i] >= 0:
                    _take_out(s, assignment[i], i)
                if place >= 0:
                    _put_in(s, place, i)
                assignment[i] = place
                _copy(tried.best, tried.now)
                effort.spent[2] += 1
            _swap_some(goal, fleet, s, words, i, oldest, assignment, tried, effort)
        if assignment[i] >= 0:
            advance(fleet.ask, s, assignment[i])
            apply(fleet.ask, s, assignment[i], 0)


def new_tried(num_requests: int, num_fates: int) -> Tried:
    """Make working memory for a sweep."""
    fates = np.zeros((4, num_fates, num_requests))
    return Tried(fates[0], fates[1], fates[2], fates[3], np.zeros(num_requests))
