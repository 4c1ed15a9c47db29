"""Playing whole episodes inside one engine under an order of its requests.

All environments that ask are answered together: one call of the policy a round.
"""

from __future__ import annotations

import time

import numpy as np

from servegym.cluster.jit import fixed, kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import (
    ALWAYS,
    DECISION,
    LOG_FULL,
    NEVER,
    WHERE_IT_MATTERS,
    Asks,
    Params,
    State,
)
from servegym.errors import ConfigError, PolicyError
from servegym.policy.ordering import NUM_ORDERING_FEATURES, OrderingPolicy
from servegym.policy.ordering_rows import write_rows
from servegym.policy.run import tell_truth
from servegym.typing import FloatArray, IntArray


@kernel
def _advance_to_asks(p: Params, s: State, reasons: IntArray) -> int:
    """Run all environments until they ask or end; return how many requests those that ask have."""
    num_rows = 0
    for e in range(reasons.shape[0]):
        reasons[e] = advance(p, s, e)
        if reasons[e] == DECISION:
            v = s.replica[e, s.env[e].asking]
            num_rows += v.num_waiting + v.num_running
    return num_rows


@kernel
def read_asked(
    p: Params, s: State, reasons: IntArray, rows: FloatArray, requests: IntArray, envs: IntArray
) -> None:
    """Write the rows of all environments that ask, one after the other."""
    first = 0
    for e in range(reasons.shape[0]):
        if reasons[e] == DECISION:
            stop = write_rows(p, s, e, s.env[e].asking, first, rows, requests)
            envs[first:stop] = e
            first = stop


@kernel
def answer_asked(
    p: Params, s: State, scores: FloatArray, requests: IntArray, envs: IntArray
) -> None:
    """Write keys, and let the engines go on."""
    for i in range(scores.shape[0]):
        s.order[envs[i], requests[i]].key = scores[i]
    last = -1
    for i in range(scores.shape[0]):
        e = envs[i]
        if e != last:
            apply(p, s, e, 0)
            last = e


def make_simulator(
    spec: ClusterSpec, episodes: list[Episode], policy: OrderingPolicy, *, record: bool = False
) -> Simulator:
    """Make a simulator whose engines ask as often as a policy has to be asked."""
    asks = Asks(dispatch=NEVER, order=ALWAYS if policy.memory_size else WHERE_IT_MATTERS)
    return Simulator(spec, episodes, record=record, asks=asks)


def _engines(simulator: Simulator) -> set[str]:
    return {simulator.spec.types[t].engine for x in simulator.episodes for t in x.type_idx}


def require_priorities(simulator: Simulator) -> None:
    """Check that all engines go by priorities.

    Raises:
        ConfigError: If not.
    """
    engines = _engines(simulator)
    if engines != {"vllm-priority"}:
        raise ConfigError(
            "orders are for a fleet whose entries all have engine: vllm-priority, got "
            f"{', '.join(sorted(engines))}"
        )


def require_one_engine(simulator: Simulator) -> None:
    """Check that there is one engine, and that it goes by priorities.

    Raises:
        ConfigError: If not.
    """
    engines = _engines(simulator)
    if engines != {"vllm-priority"} or any(x.num_replicas > 1 for x in simulator.episodes):
        raise ConfigError(
            "orders are for a fleet of one replica with engine: vllm-priority, got "
            f"{max(x.num_replicas for x in simulator.episodes)} of {', '.join(sorted(engines))}"
        )


def run_ordering(simulator: Simulator, policy: OrderingPolicy) -> IntArray:
    """Drive every environment of a simulator to the end of its episode.

    An oracle sees the true output lengths where others see predictions.

    Args:
        simulator: Freshly made by `make_simulator`.
        policy: Orders the requests.

    Returns:
        How often the policy was asked in each environment, `int64[num_envs]`.

    Raises:
        ConfigError: If there is more than one engine, or it does not go by priorities.
        PolicyError: If the policy gives another number of scores, or one is not finite.
    """
    require_one_engine(simulator)
    tell_truth(simulator, policy.information)
    num_requests = simulator.state.request.shape[1]
    memory = np.zeros((simulator.num_envs * num_requests, policy.memory_size))
    asked = np.zeros(simulator.num_envs, np.int64)
    while True:
        rows, requests, envs = next_asks(simulator)
        if not len(rows):
            return asked
        scores = scores_of(policy, rows, memory, envs * num_requests + requests)
        asked[np.unique(envs)] += 1
        give_answers(simulator, scores, requests, envs)


def next_asks(simulator: Simulator) -> tuple[FloatArray, IntArray, IntArray]:
    """Run to the next asks; return rows, requests and environments, empty at the end."""
    while True:
        arguments = simulator.params, simulator.state, simulator.reasons
        num_rows = fixed(_advance_to_asks, *arguments)(*arguments)
        if not (simulator.reasons == LOG_FULL).any():
            break
        simulator.grow_logs()
    rows = np.empty((num_rows, NUM_ORDERING_FEATURES))
    requests, envs = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    found = rows, requests, envs
    fixed(read_asked, *arguments, *found)(*arguments, *found)
    return found


def give_answers(
    simulator: Simulator, scores: FloatArray, requests: IntArray, envs: IntArray
) -> None:
    """Order what `next_asks` returned by its scores, and let the engines go on."""
    arguments = simulator.params, simulator.state, scores, requests, envs
    fixed(answer_asked, *arguments)(*arguments)


def scores_of(
    policy: OrderingPolicy, rows: FloatArray, memory: FloatArray, slots: IntArray
) -> FloatArray:
    """Score requests that are asked about, and keep what the policy remembers of them.

    Args:
        policy: Orders them.
        rows: `float64[n, NUM_ORDERING_FEATURES]`.
        memory: Of all requests of all environments, `float64[num_envs * N, memory_size]`.
        slots: Their rows there, `int64[n]`.

    Returns:
        `float64[n]`.

    Raises:
        PolicyError: If there is another number of scores, or one is not finite.
    """
    kept = memory[slots]
    scores = np.ascontiguousarray(policy.score(rows, kept), np.float64)
    if policy.memory_size:
        memory[slots] = kept
    if scores.shape != slots.shape or not np.isfinite(scores).all():
        raise PolicyError(
            f"{policy.name} must give {len(slots)} requests as many finite scores, got "
            f"{int(np.isfinite(scores).sum())} of shape {scores.shape}"
        )
    return scores


def time_orders(policy: OrderingPolicy, simulator: Simulator, num_asks: int = 200) -> FloatArray:
    """Measure single orders on the states an episode passes through.

    Args:
        policy: Orders the requests.
        simulator: Freshly made for one environment.
        num_asks: How many to time at most.

    Returns:
        Seconds per order, the rows not counted, `float64[<= num_asks]`.
    """
    tell_truth(simulator, policy.information)
    memory = np.zeros((simulator.state.request.shape[1], policy.memory_size))
    taken: list[float] = []
    while len(taken) < num_asks:
        rows, requests, envs = next_asks(simulator)
        if not len(rows):
            break
        begin = time.perf_counter()
        scores = scores_of(policy, rows, memory, requests)
        taken.append(time.perf_counter() - begin)
        give_answers(simulator, scores, requests, envs)
    return np.array(taken)
