"""The search through assignments of requests to replicas, around its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numba import typeof

from servegym.clairvoyant.copies import words_of
from servegym.clairvoyant.fleet import MOST_HOLDS, UNKNOWN, play_assigned, sweep_fleet
from servegym.clairvoyant.goal import NUM_FATES, Goal, is_better, judged, loss, make_goal
from servegym.clairvoyant.replicas import REJECT, Effort, Fleet, new_tried, play_all, sweep
from servegym.cluster.allocate import (
    Capacity,
    load_episode,
    make_params,
    make_state,
    wanted_entries,
)
from servegym.cluster.entry import addresses
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults
from servegym.cluster.state import (
    EV_DISPATCH,
    EV_HOLD,
    EV_PLACE,
    EV_REJECT,
    FAULT_DOWN,
    LOG_FULL,
    NEVER,
    OBSERVED_KV_CAPACITY,
    WHERE_IT_MATTERS,
    Asks,
    Params,
    State,
)
from servegym.typing import BoolArray, IntArray
from servegym.workloads.table import BY_ITSELF

#: Exchanges tried with each request once moving alone no longer helps, and with how many of the
#: next ones.
_SWAPS, _WINDOW = 4, 32
#: One in so many requests is sent anywhere when that does not help either.
_KICK = 50
#: Other choices tried at each decision where the whole fleet has to be played.
_TRIES = 1.0


@dataclass(frozen=True)
class Found:
    """An assignment and what it took to find it.

    Attributes:
        choice: Replica of each request or `REJECT`, at its first dispatch and at those after
            crashes, `int64[N, K]`; `UNKNOWN` where it was not sent so often. In a disaggregated
            fleet each is followed by where the request decodes then; where a router may hold
            requests, by how often it was held so far, since its arrival.
        loss: Of the whole episode under it, see `goal.loss`.
        num_changes: Changes that were kept.
        episodes_played: Simulation it took, in whole episodes.
    """

    choice: IntArray
    loss: tuple[float, float]
    num_changes: int
    episodes_played: float


def choice_of(simulator: Simulator, env: int = 0) -> IntArray:
    """Return the assignment that a recorded run came to, `int64[N, K]`; see `Found`."""
    spec = simulator.spec
    events = simulator.events(env)
    events = events[np.isin(events["kind"], (EV_DISPATCH, EV_HOLD, EV_REJECT, EV_PLACE))]
    order = np.argsort(events["request"], kind="stable")
    kind, request = events["kind"][order], events["request"][order].astype(np.int64)
    sent = (kind == EV_DISPATCH) | (kind == EV_REJECT)
    first = np.concatenate(([True], request[1:] != request[:-1]))
    # at which of its dispatches a request was, and how often it had been held
    turn = _of_each(first, sent)
    num_holds = _of_each(first, kind == EV_HOLD)
    width = _width(spec)
    num_requests = int(simulator.state.env[env]["num_requests"])
    choice = np.full((num_requests, width * (int(turn[sent].max()) + 1)), UNKNOWN, np.int64)
    place = np.where(kind == EV_REJECT, REJECT, events["replica"][order])
    choice[request[sent], width * turn[sent]] = place[sent]
    if spec.disaggregated:
        told = kind == EV_PLACE
        choice[request[told], width * (turn[told] - 1) + 1] = place[told]
    if spec.allow_hold:
        choice[request[sent], width * (turn[sent] + 1) - 1] = num_holds[sent]
    return choice


def _width(spec: ClusterSpec) -> int:
    """How many columns of an assignment tell of one dispatch, see `Found`."""
    return 1 + spec.disaggregated + spec.allow_hold


def _of_each(first: BoolArray, counted: BoolArray) -> IntArray:
    """Count events of the same request that come before each one; `first` says where one begins."""
    so_far: IntArray = np.cumsum(counted) - counted
    return so_far - np.maximum.accumulate(np.where(first, so_far, 0))


def replay(
    spec: ClusterSpec, episodes: Sequence[Episode], choices: Sequence[IntArray]
) -> Simulator:
    """Play episodes under assignments, with a record, and return the simulator that did."""
    simulator = Simulator(spec, episodes, record=True, asks=_asks(spec))
    for env, choice in enumerate(choices):
        while True:
            reason = play_assigned(simulator.params, simulator.state, env, choice)
            if reason != LOG_FULL:
                break
            simulator.grow_logs()
        simulator.reasons[env] = reason
    return simulator


def _asks(spec: ClusterSpec) -> Asks:
    """Which decisions an assignment tells."""
    return Asks(place=WHERE_IT_MATTERS) if spec.disaggregated else Asks()


def plays_alone(spec: ClusterSpec, episode: Episode) -> bool:
    """Whether what a replica does depends on the requests it gets and on nothing else."""
    return bool(
        not spec.allow_hold  # who is held arrives out of turn
        and (episode.table.after == BY_ITSELF).all()
        and not (episode.faults.kind == FAULT_DOWN).any()
        and not any(spec.types[t].num_ranks for t in episode.type_idx)
        and not spec.moves_kv
        and not spec.tiered
    )


def search(
    spec: ClusterSpec,
    episode: Episode,
    start: IntArray,
    metric: str,
    *,
    budget: float,
    seed: int = 0,
    may_reject: bool = False,
) -> Found:
    """Improve an assignment, knowing all that comes and how long everything is.

    Args:
        spec: The cluster.
        episode: What is played.
        start: An assignment, `int64[N, K]`; see `Found`.
        metric: One of `goal.METRICS`.
        budget: Simulation it may take, in whole episodes.
        seed: Of what is drawn: exchanges, or which other choices are tried.
        may_reject: Whether requests may be rejected.

    Returns:
        An assignment that is not worse than `start`.
    """
    quiet = replace(spec, metrics_interval_s=0.0)
    goal = make_goal(metric, quiet, episode)
    rng = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    spent = np.array([0, int(budget * len(episode.table)), 0], np.int64)
    if plays_alone(spec, episode):
        choice, least = _search_replicas(quiet, episode, start, goal, may_reject, rng, spent)
    else:
        choice, least = _search_fleet(quiet, episode, start, goal, may_reject, rng, spent)
    return Found(choice, least, int(spent[2]), spent[0] / len(episode.table))


def best_choices(
    spec: ClusterSpec,
    episodes: Sequence[Episode],
    starts: Sequence[Simulator],
    metric: str,
    *,
    budget: float,
    seed: int = 0,
) -> list[IntArray]:
    """Search each episode, beginning with the best of several runs; two at a time and more.

    Args:
        spec: The cluster; where requests migrate, they do by its rule.
        episodes: What was played.
        starts: Recorded runs of all episodes.
        metric: One of `goal.METRICS`.
        budget: Simulation for an episode, in whole episodes.
        seed: Of the search.

    Returns:
        An assignment for each episode, as `replay` takes them.
    """
    # under a latency objective, whom one rejects would not count
    may_reject = spec.allow_reject and metric == "goodput_rps"

    def searched(env: int) -> IntArray:
        episode = episodes[env]
        goal = make_goal(metric, spec, episode)
        begun = [
            (judged(goal, s.state.request[env, : len(episode.table)]), choice_of(s, env))
            for s in starts
        ]
        least, start = min(begun, key=lambda one: one[0])
        left = budget
        if spec.allow_hold:
            found = _sent_at_once(
                spec, episode, begun, metric, budget / 2, seed + env, may_reject=may_reject
            )
            left -= found.episodes_played if found else 0.0
            if found and is_better(found.loss, least):
                start = found.choice
        return search(
            spec, episode, start, metric, budget=left, seed=seed + env, may_reject=may_reject
        ).choice

    with ThreadPoolExecutor() as pool:  # compiled code does not hold the interpreter up
        return list(pool.map(searched, range(len(episodes))))


def _sent_at_once(
    spec: ClusterSpec,
    episode: Episode,
    begun: Sequence[tuple[tuple[float, float], IntArray]],
    metric: str,
    budget: float,
    seed: int,
    *,
    may_reject: bool,
) -> Found | None:
    """Search without holding anybody, if replicas can be played alone then.

    That tries far more for the same simulation than where the whole fleet is played.
    """
    prompt = replace(spec, allow_hold=False)
    plain = [(least, choice) for least, choice in begun if not choice[:, 1].any()]
    if not plain or not plays_alone(prompt, episode):
        return None
    start = min(plain, key=lambda one: one[0])[1][:, :1]
    found = search(prompt, episode, start, metric, budget=budget, seed=seed, may_reject=may_reject)
    return replace(found, choice=np.hstack((found.choice, np.zeros_like(found.choice))))


def _with_entries(spec: ClusterSpec, params: Params, state: State) -> Params:
    wanted = wanted_entries(spec, params.asks)
    params.entries[:] = addresses(typeof(params), typeof(state), wanted)
    return params


def _search_replicas(
    spec: ClusterSpec,
    episode: Episode,
    start: IntArray,
    goal: Goal,
    may_reject: bool,
    rng: np.ndarray,
    spent: IntArray,
) -> tuple[IntArray, tuple[float, float]]:
    num_replicas = episode.num_replicas
    alone = [_alone(episode, r) for r in range(num_replicas)]
    capacity = Capacity.of(spec, alone, record=False)._replace(num_envs=num_replicas + 2)
    state = make_state(spec, capacity)
    ask = _with_entries(spec, make_params(spec, record=False), state)
    play = _with_entries(spec, make_params(spec, record=False, asks=Asks(dispatch=NEVER)), state)
    for env, one in enumerate([*alone, alone[0], alone[0]]):
        load_episode(ask, state, env, one)
        state.replica[env, 0]["noise_stream"] = env
    need = episode.table.prompt_tokens.astype(np.int64) + episode.table.output_tokens - 1
    holds = state.observation[:num_replicas, OBSERVED_KV_CAPACITY, 0]
    fleet = Fleet(ask, play, episode.table.arrival_s, need[:, None] <= holds[None, :], may_reject)
    words = words_of(state)
    assignment = start[:, 0].copy()
    tried = new_tried(len(assignment), NUM_FATES)
    oldest = np.zeros(num_replicas, np.int64)
    play_all(fleet, state, words, assignment, tried, Effort(0, _WINDOW, rng, spent))
    rest = np.random.default_rng(rng)
    best, least = assignment.copy(), loss(goal, tried.now, tried.room)
    num_swaps = 0
    while spent[0] < spent[1]:
        before = int(spent[2])
        effort = Effort(num_swaps, _WINDOW, rng, spent)
        sweep(goal, fleet, state, words, assignment, oldest, tried, effort)
        found = loss(goal, tried.now, tried.room)
        if is_better(found, least):
            best, least = assignment.copy(), found
        if num_swaps and spent[2] == before:  # nothing helps any more: begin elsewhere
            assignment[:] = best
            _kick(assignment, goal.first, fleet.fits, rest)
            effort = Effort(0, _WINDOW, rng, spent)
            play_all(fleet, state, words, assignment, tried, effort)
        num_swaps = _SWAPS
    return best[:, None], least


def _kick(assignment: IntArray, first: int, fits: BoolArray, rng: np.random.Generator) -> IntArray:
    """Send some requests anywhere, and return which ones."""
    judged_ones = np.arange(first, len(assignment))
    count = min(len(judged_ones), max(2, len(judged_ones) // _KICK))
    kicked: IntArray = rng.choice(judged_ones, count, replace=False)
    for i in kicked:
        assignment[i] = rng.choice(np.flatnonzero(fits[i]))
    return kicked


def _alone(episode: Episode, r: int) -> Episode:
    """The episode of one replica, to which any request may come."""
    mine = episode.faults.replica == r
    faults = episode.faults
    return replace(
        episode,
        type_idx=episode.type_idx[r : r + 1],
        speed=episode.speed[r : r + 1],
        faults=Faults(
            faults.time_s[mine],
            np.zeros(int(mine.sum()), np.int16),
            faults.kind[mine],
            faults.value[mine],
        ),
    )


def _search_fleet(
    spec: ClusterSpec,
    episode: Episode,
    start: IntArray,
    goal: Goal,
    may_reject: bool,
    rng: np.ndarray,
    spent: IntArray,
) -> tuple[IntArray, tuple[float, float]]:
    state = make_state(spec, Capacity.of(spec, [episode, episode], record=False))
    params = _with_entries(spec, make_params(spec, record=False, asks=_asks(spec)), state)
    words = words_of(state)
    choice = start.copy()
    fates, room = np.zeros((NUM_FATES, len(choice))), np.zeros(len(choice))
    load_episode(params, state, 1, episode)
    every = np.ones((len(choice), episode.num_replicas), np.bool_)  # what cannot be is put right
    rest = np.random.default_rng(rng)
    best, least = choice.copy(), (math.inf, math.inf)
    tries = 0.0
    while True:
        before = int(spent[2])
        load_episode(params, state, 0, episode)
        found = sweep_fleet(
            goal, params, state, words, choice, fates, room, _TRIES, may_reject, rng, spent
        )
        if is_better(found, least):
            best, least = choice.copy(), found
        if spent[0] >= spent[1]:
            return best, least
        tries = tries + _TRIES if spent[2] == before else 0.0
        if tries > 2 * episode.num_replicas:  # nothing helps any more: begin elsewhere
            choice, tries = best.copy(), 0.0
            kicked = _kick(choice[:, 0], goal.first, every, rest)
            if spec.allow_hold:
                holds = MOST_HOLDS ** rest.uniform(size=len(kicked)) - 1.0
                choice[kicked, _width(spec) - 1] = holds.astype(np.int64)
