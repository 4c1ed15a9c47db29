"""Playing whole episodes of a fleet under a dispatch policy and an order of its engines.

Dispatches are taken as they come; when every environment waits for an order or has ended, all
engines that ask are answered together.
"""

from __future__ import annotations

import time

import numpy as np

from servegym.cluster.kernels import apply, may_answer
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import ALWAYS, WHERE_IT_MATTERS, Asks
from servegym.errors import PolicyError
from servegym.policy.contract import Group
from servegym.policy.observe import observe_batch, prepare
from servegym.policy.pair import Pair
from servegym.policy.policy import Heuristic, Policy
from servegym.policy.run import run_compiled, tell_truth
from servegym.policy.run_ordering import give_answers, next_asks, require_priorities, scores_of
from servegym.typing import FloatArray


def make_simulator(
    spec: ClusterSpec, episodes: list[Episode], pair: Pair, *, record: bool = False
) -> Simulator:
    """Make a simulator whose router and engines ask as often as a pair has to be asked."""
    order = ALWAYS if pair.order.memory_size else WHERE_IT_MATTERS
    asks = Asks(dispatch=WHERE_IT_MATTERS, order=order)
    return Simulator(spec, episodes, record=record, asks=asks)


def run_pair(simulator: Simulator, pair: Pair, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    Args:
        simulator: Freshly made by `make_simulator`.
        pair: Decides; its dispatch policy is reset first.
        seed: Of the dispatch policy's own randomness.

    Raises:
        ConfigError: If an engine does not go by priorities.
        PolicyError: If the order gives another number of scores or one that is not finite, or a
            dispatch is not allowed.
    """
    dispatch = pair.dispatch
    memory = _begin(simulator, pair, seed)
    while True:
        if isinstance(dispatch, Heuristic) and not dispatch.needs & Group.WHAT_IF:
            run_compiled(simulator, dispatch)
        else:
            _dispatch(simulator, dispatch, [])
        if not _order(simulator, pair, memory, []):
            return


def time_pair(pair: Pair, simulator: Simulator, num_decisions: int = 200) -> FloatArray:
    """Measure single decisions of both on the states an episode passes through.

    Args:
        pair: Decides.
        simulator: Freshly made for one environment.
        num_decisions: How many to time at least, if there are so many.

    Returns:
        Seconds per dispatch or order, what is observed not counted, `float64[n]`.
    """
    memory = _begin(simulator, pair, 0)
    taken: list[float] = []
    while len(taken) < num_decisions:
        _dispatch(simulator, pair.dispatch, taken)
        if not _order(simulator, pair, memory, taken):
            break
    return np.array(taken)


def _begin(simulator: Simulator, pair: Pair, seed: int) -> FloatArray:
    """Prepare both; return the memory of the order, one row a request."""
    require_priorities(simulator)
    tell_truth(simulator, pair.information)
    prepare(simulator, pair.dispatch.needs)
    pair.dispatch.reset(simulator.num_envs, seed)
    num_requests = simulator.state.request.shape[1]
    return np.zeros((simulator.num_envs * num_requests, pair.order.memory_size))


def _dispatch(simulator: Simulator, policy: Policy, taken: list[float]) -> None:
    """Take all dispatches that are due before the next orders."""
    while True:
        simulator.advance()
        observations, envs = observe_batch(simulator, policy.needs)
        if not len(envs):
            return
        begin = time.perf_counter()
        actions = policy.act(observations, envs)
        taken.append((time.perf_counter() - begin) / len(envs))
        for env, action in zip(envs.tolist(), actions.tolist(), strict=True):
            if not may_answer(simulator.params, simulator.state, env, action):
                allowed = np.flatnonzero(simulator.state.allowed[env]).tolist()
                raise PolicyError(
                    f"{policy.name} chose {action} in environment {env}: allowed are {allowed}"
                )
            apply(simulator.params, simulator.state, env, action)


def _order(simulator: Simulator, pair: Pair, memory: FloatArray, taken: list[float]) -> bool:
    """Answer all engines that ask for an order; return False if none does."""
    rows, requests, envs = next_asks(simulator)
    if not len(rows):
        return False
    begin = time.perf_counter()
    slots = envs * simulator.state.request.shape[1] + requests
    scores = scores_of(pair.order, rows, memory, slots)
    taken.append((time.perf_counter() - begin) / len(np.unique(envs)))
    give_answers(simulator, scores, requests, envs)
    return True
