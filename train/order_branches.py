"""What else could have been admitted or preempted, and what would have come of it.

An engine can be copied. At some choices of an episode each of some requests is picked in a copy,
which then plays on under the present policy: with the requests that arrive meanwhile, the same in
all copies, until all that was there and arrived soon after has ended.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from servegym.clairvoyant.copies import Words, copy_env, words_of
from servegym.cluster.jit import inlined, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.rng import next_uniform
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import DECISION, NEVER, PREEMPT, WHERE_IT_MATTERS, Asks, Params, State
from servegym.policy.ordering import NUM_ORDERING_FEATURES
from servegym.policy.ordering_rows import write_row
from servegym.policy.play_perceptron import Perceptrons, score_row
from servegym.typing import BoolArray, FloatArray, IntArray, UInt64Array
from servegym.workloads.table import BY_ITSELF


class Branches(NamedTuple):
    """Choices of which several were tried; axes: L choices, K requests of each, as many as there.

    Attributes:
        rows: Features, normalised as the perceptrons have them, `float64[L, K, F]`.
        preempts: Whether it is whom to preempt, else whom to admit, `bool[L]`.
        tried: Which of the K are requests, `bool[L, K]`.
        values: What became of each: minus request-seconds from then on, or the weight of requests
            that ended within their limits, `float64[L, K]`.
    """

    rows: FloatArray
    preempts: BoolArray
    tried: BoolArray
    values: FloatArray

    def first(self, count: int) -> Branches:
        """Return the first so many choices."""
        return Branches(
            self.rows[:count], self.preempts[:count], self.tried[:count], self.values[:count]
        )


class Rules(NamedTuple):
    """How choices are made and tried.

    Attributes:
        temperature: Of the draws: a request is picked with a probability that is exponential in
            its score over this.
        label_every: One choice in so many is tried.
        horizon_s: For so long requests arrive in the copies.
        goodput: Whether requests within their limits count, else their times do.
    """

    temperature: float
    label_every: int
    horizon_s: float
    goodput: bool


@inlined
def _first_in_system(s: State, e: int, r: int) -> int:
    """Return the least number of a request that is there, or yet to come."""
    first = s.env[e].next_arrival
    for running in range(2):
        request = s.replica[e, r].run_head if running else s.replica[e, r].wait_head
        while request >= 0:
            first = min(first, request)
            request = s.request[e, request].next_request
    return first


@inlined
def _pick(p: Params, s: State, e: int, n: Perceptrons, row: FloatArray) -> int:
    """Return whom an order admits or preempts: the first of the queue, the last of the running."""
    r = s.env[e].asking
    preempts = s.env[e].decision == PREEMPT
    best, best_score = -1, 0.0
    request = s.replica[e, r].run_head if preempts else s.replica[e, r].wait_head
    while request >= 0:
        write_row(p, s, e, r, request, preempts, row)
        score = score_row(n, 0, row, int(preempts))
        if preempts:
            score = -score
        # the earlier is admitted first, the later preempted first
        ahead = score < best_score or (score == best_score and preempts == (request > best))
        if best < 0 or ahead:
            best, best_score = request, score
        request = s.request[e, request].next_request
    return best


@inlined
def _draw(
    p: Params,
    s: State,
    n: Perceptrons,
    c: Rules,
    rng: UInt64Array,
    row: FloatArray,
    ids: IntArray,
    keys: FloatArray,
) -> int:
    """Draw several whom the policy picks, one after the other without putting any back.

    Args:
        p: Constants.
        s: State; the first environment asks.
        n: The policy.
        c: How choices are made.
        rng: Randomness.
        row: Working memory.
        ids: Requests in the order of the draws, `int64[K]`; the first is the policy's pick.
        keys: Working memory, `float64[K]`.

    Returns:
        How many there are.
    """
    r = s.env[0].asking
    preempts = s.env[0].decision == PREEMPT
    sign = 1.0 if preempts else -1.0
    count = 0
    request = s.replica[0, r].run_head if preempts else s.replica[0, r].wait_head
    while request >= 0:
        write_row(p, s, 0, r, request, preempts, row)
        noise = -math.log(-math.log(next_uniform(rng)))
        key = sign * score_row(n, 0, row, int(preempts)) / c.temperature + noise
        place = count
        while place > 0 and keys[place - 1] < key:
            place -= 1
        if place < ids.shape[0]:
            count = min(count + 1, ids.shape[0])
            for i in range(count - 1, place, -1):
                keys[i], ids[i] = keys[i - 1], ids[i - 1]
            keys[place], ids[place] = key, request
        request = s.request[0, request].next_request
    return count


@kernel
def _try(
    p: Params,
    s: State,
    words: Words,
    n: Perceptrons,
    c: Rules,
    request: int,
    row: FloatArray,
) -> float:
    """Pick a request in the copy, play on, and say what became of all."""
    first = _first_in_system(s, 0, s.env[0].asking)
    copy_env(s, words, 0, 1, first)
    env = s.env[1]
    until_s = env.now_s + c.horizon_s
    stop = env.next_arrival
    while stop < env.num_requests and not s.request[1, stop].arrival_s > until_s:
        stop += 1
    env.num_requests = stop
    apply(p, s, 1, request)
    while advance(p, s, 1) == DECISION:
        apply(p, s, 1, _pick(p, s, 1, n, row))
    return env.good if c.goodput else -env.area


@kernel
def _collect(
    p: Params,
    s: State,
    words: Words,
    n: Perceptrons,
    c: Rules,
    rng: UInt64Array,
    row: FloatArray,
    ids: IntArray,
    keys: FloatArray,
    out: Branches,
) -> int:
    """Play the first environment to its end, try some choices; return how many."""
    count = 0
    while advance(p, s, 0) == DECISION:
        num = _draw(p, s, n, c, rng, row, ids, keys)
        if num > 1 and count < out.values.shape[0] and next_uniform(rng) * c.label_every < 1.0:
            r, preempts = s.env[0].asking, s.env[0].decision == PREEMPT
            out.preempts[count] = preempts
            for k in range(num):
                out.values[count, k] = _try(p, s, words, n, c, ids[k], row)
                out.tried[count, k] = True
                write_row(p, s, 0, r, ids[k], preempts, row)
                score_row(n, 0, row, int(preempts))  # normalises it
                for f in range(row.shape[0]):
                    out.rows[count, k, f] = row[f]
            count += 1
        apply(p, s, 0, ids[0])
    return count


def collect(
    spec: ClusterSpec,
    episode: Episode,
    nets: Perceptrons,
    rules: Rules,
    *,
    num_choices: int,
    seed: int,
) -> Branches:
    """Play an episode by draws from a policy, and try other picks at some of its choices.

    Args:
        spec: The cluster, of one engine that goes by priorities.
        episode: What is played; if some of its requests wait for others, copies play on to its end.
        nets: The policy, the first of them.
        rules: How choices are made and tried.
        num_choices: Requests that are tried at a choice, at most, as the policy draws them.
        seed: Of the draws.

    Returns:
        What was tried.
    """
    if not (episode.table.after == BY_ITSELF).all():
        rules = rules._replace(horizon_s=math.inf)
    asks = Asks(dispatch=NEVER, admit=WHERE_IT_MATTERS, preempt=WHERE_IT_MATTERS)
    simulator = Simulator(spec, [episode, episode], asks=asks)
    # who waits is chosen among step by step while the one that was picked does not fit
    most = 16 * len(episode.table.arrival_s) // rules.label_every + 16
    out = Branches(
        np.zeros((most, num_choices, NUM_ORDERING_FEATURES)),
        np.zeros(most, np.bool_),
        np.zeros((most, num_choices), np.bool_),
        np.zeros((most, num_choices)),
    )
    count = _collect(
        simulator.params,
        simulator.state,
        words_of(simulator.state),
        nets,
        rules,
        np.array([seed], np.uint64),
        np.empty(NUM_ORDERING_FEATURES),
        np.empty(num_choices, np.int64),
        np.empty(num_choices),
        out,
    )
    return out.first(count)
