"""Search through orders inside one engine: a fixed priority for each request.

The engine goes by the priorities alone, as it does when nobody is asked. A sweep plays the episode
once and, at each arrival, copies the engine to play other priorities of that request to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numba import typeof

from servegym.clairvoyant.copies import Words, copy_env, words_of
from servegym.clairvoyant.goal import (
    NUM_FATES,
    Goal,
    is_better,
    judged,
    loss,
    make_goal,
    read_fates,
)
from servegym.cluster.allocate import Capacity, load_episode, make_params, make_state
from servegym.cluster.entry import addresses
from servegym.cluster.jit import kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.rng import next_uniform
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, NEVER, Asks, Params, State
from servegym.typing import FloatArray, IntArray, UInt64Array
from servegym.workloads.table import RequestTable

#: Nobody is asked; dispatch to the only replica is asked for where the search has to halt.
_UNASKED = Asks(dispatch=NEVER)
#: A new priority is near that of a request that arrives so many before or after.
_WINDOW = 48

#: Priorities to begin with, from what requests really are; lower goes first.
_STARTS: tuple[Callable[[RequestTable, FloatArray], FloatArray], ...] = (
    lambda table, ttft_s: table.arrival_s,
    lambda table, ttft_s: table.output_tokens.astype(np.float64),
    lambda table, ttft_s: table.prompt_tokens + 4.0 * table.output_tokens,
    lambda table, ttft_s: (table.prompt_tokens + 0.5 * table.output_tokens) * table.output_tokens,
    lambda table, ttft_s: table.arrival_s + ttft_s,
)


@kernel
def _sweep(
    goal: Goal,
    ask: Params,
    play: Params,
    s: State,
    words: Words,
    key: FloatArray,
    fates: FloatArray,
    room: FloatArray,
    rng: UInt64Array,
    spent: IntArray,
) -> None:
    """Try another priority for every request once, and keep what is better.

    Args:
        goal: What counts; requests that are not judged keep their priorities.
        ask: Constants with which arrivals halt the engine.
        play: Constants with which nothing does.
        s: Two environments, the first one at the beginning.
        words: The same as numbers.
        key: Priorities, `float64[N]`; written in place.
        fates: Working memory, `float64[NUM_FATES, N]`.
        room: Working memory, `float64[N]`.
        rng: Which priorities, `uint64[1]`.
        spent: Requests played so far, the most that may be, changes made, `int64[3]`.
    """
    num_requests = key.shape[0]
    copy_env(s, words, 0, 1, 0)
    for i in range(num_requests):
        s.order[0, i].key = key[i]
        s.order[1, i].key = key[i]
    advance(play, s, 1)
    read_fates(s, 1, fates)
    best = loss(goal, fates, room)
    spent[0] += num_requests
    while advance(ask, s, 0) == DECISION and spent[0] < spent[1]:
        i = s.env[0].deciding
        near = i + int((2.0 * next_uniform(rng) - 1.0) * _WINDOW)
        near = min(max(near, 0), num_requests - 1)
        old = key[i]
        if near != i and i >= goal.first:
            key[i] = key[near] + 2.0 * next_uniform(rng) - 1.0
            copy_env(s, words, 0, 1, 0)
            s.order[1, i].key = key[i]
            spent[0] += num_requests - s.env[1].num_ended
            apply(play, s, 1, 0)
            advance(play, s, 1)
            read_fates(s, 1, fates)
            found = loss(goal, fates, room)
            if is_better(found, best):
                best = found
                s.order[0, i].key = key[i]
                spent[2] += 1
            else:
                key[i] = old
        apply(ask, s, 0, 0)


def play_keys(
    spec: ClusterSpec, episodes: Sequence[Episode], keys: Sequence[FloatArray]
) -> Simulator:
    """Play episodes under fixed priorities, with a record, and return the simulator that did."""
    simulator = Simulator(spec, episodes, record=True, asks=_UNASKED)
    for env, key in enumerate(keys):
        simulator.state.order["key"][env, : len(key)] = key
    simulator.advance()
    return simulator


def search_keys(
    spec: ClusterSpec, episode: Episode, metric: str, *, budget: float, seed: int = 0
) -> FloatArray:
    """Find priorities, knowing all that comes and how long everything is.

    Args:
        spec: The cluster, of one engine that goes by priorities.
        episode: What is played.
        metric: One of `goal.METRICS`.
        budget: Simulation it may take, in whole episodes.
        seed: Of the priorities that are tried.

    Returns:
        One for each request, lower goes first, `float64[N]`.
    """
    table = episode.table
    goal = make_goal(metric, spec, episode)
    first_s = np.array([c.ttft_s for c in spec.slo_classes])[table.slo_class]
    ranks = [_ranks(make(table, first_s)) for make in _STARTS]
    played = play_keys(spec, [episode] * len(ranks), ranks)
    losses = [judged(goal, played.state.request[k, : len(table)]) for k in range(len(ranks))]
    key = ranks[min(range(len(ranks)), key=lambda k: losses[k])]
    quiet = replace(spec, metrics_interval_s=0.0)
    state = make_state(quiet, Capacity.of(quiet, [episode, episode], record=False))
    ask = make_params(quiet, record=False)
    play = make_params(quiet, record=False, asks=_UNASKED)
    for params in (ask, play):
        params.entries[:] = addresses(typeof(params), typeof(state))
    words = words_of(state)
    fates, room = np.zeros((NUM_FATES, len(table))), np.zeros(len(table))
    rng = np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64)
    spent = np.array([len(ranks) * len(table), int(budget * len(table)), 0], np.int64)
    load_episode(ask, state, 1, episode)
    while spent[0] < spent[1]:
        load_episode(ask, state, 0, episode)
        _sweep(goal, ask, play, state, words, key, fates, room, rng, spent)
    return key


def best_keys(
    spec: ClusterSpec,
    episodes: Sequence[Episode],
    metric: str,
    *,
    budget: float,
    seed: int = 0,
) -> list[FloatArray]:
    """Search each episode, two at a time and more; see `search_keys`."""

    def searched(env: int) -> FloatArray:
        return search_keys(spec, episodes[env], metric, budget=budget, seed=seed + env)

    with ThreadPoolExecutor() as pool:  # compiled code does not hold the interpreter up
        return list(pool.map(searched, range(len(episodes))))


def _ranks(values: FloatArray) -> FloatArray:
    """Places in ascending order, equal ones in order of arrival."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values), dtype=np.float64)
    return ranks
