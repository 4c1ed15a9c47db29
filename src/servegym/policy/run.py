"""Playing whole episodes under a policy: rules in compiled code, others batch by batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import DECISION, DISPATCH, DONE, LOG_FULL, Params, State
from servegym.errors import ConfigError
from servegym.policy.contract import NUM_REQUEST_FEATURES, Group
from servegym.policy.observe import observe, observe_batch, prepare
from servegym.policy.online import OnlinePolicy, SimulatorTold
from servegym.policy.policy import Decide, Heuristic, Information, Policy
from servegym.policy.rule import compile_for_rules
from servegym.typing import FloatArray, IntArray, UInt64Array


def _play(
    decide: Decide,
    p: Params,
    s: State,
    needs: int,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
    request: FloatArray,
    reasons: IntArray,
) -> int:
    """Dispatch by a compiled rule to the end, a full log, or a decision of another kind.

    Environment after environment; returns the first one whose log is full, or -1.
    """
    for e in range(reasons.shape[0]):
        while True:
            reasons[e] = advance(p, s, e)
            if reasons[e] != DECISION or s.env[e].decision != DISPATCH:
                break
            observe(p, s, e, needs, request)
            view, allowed = s.observation[e], s.allowed[e]
            apply(p, s, e, decide(view, request, allowed, params, memory[e], rng[e]))
        if reasons[e] == LOG_FULL:
            return e
    return -1


_players: list[Callable[..., int]] = []


def _player(arguments: tuple[object, ...]) -> Callable[..., int]:
    if not _players:  # the types of the arguments never differ
        _players.append(compile_for_rules(_play, arguments))
    return _players[0]


def run(simulator: Simulator, policy: Policy, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    An oracle sees the true output lengths where others see predictions.

    Args:
        simulator: Freshly loaded.
        policy: Decides; it is reset first.
        seed: Of the policy's own randomness.
    """
    require_whole_requests(simulator, policy)
    policy.reset(simulator.num_envs, seed)
    tell_truth(simulator, policy.information)
    if isinstance(policy, Heuristic) and not policy.needs & Group.WHAT_IF:
        run_compiled(simulator, policy)
        return
    told = SimulatorTold(simulator, policy) if isinstance(policy, OnlinePolicy) else None
    while (simulator.advance() != DONE).any():
        if told is not None:
            told.tell_news()
        observations, envs = observe_batch(simulator, policy.needs)
        actions = np.zeros(simulator.num_envs, np.int64)
        actions[envs] = policy.act(observations, envs)
        if told is not None:
            told.tell_chosen(observations, envs, actions[envs])
        simulator.apply(actions)


def require_whole_requests(simulator: Simulator, policy: Policy) -> None:
    """Refuse planners where KV moves: between replicas, or between them and what is behind them.

    Raises:
        ConfigError: If a policy looks ahead as if a replica computed all of a request.
    """
    if policy.needs & Group.WHAT_IF and simulator.spec.migrates:
        raise ConfigError(
            f"{policy.name} simulates each replica as if requests stayed where they are, but here "
            "they migrate: choose another policy"
        )
    if policy.needs & Group.WHAT_IF and simulator.spec.disaggregated:
        raise ConfigError(
            f"{policy.name} simulates each replica as if it did all of a request, but here some "
            "only prefill or decode: choose another policy"
        )
    if policy.needs & Group.WHAT_IF and simulator.spec.tiered:
        raise ConfigError(
            f"{policy.name} simulates each replica as if it computed all of a request, but here KV "
            "is loaded from tiers or from other replicas: choose another policy"
        )


def tell_truth(simulator: Simulator, information: Information) -> None:
    """Show an oracle the true output lengths where others see predictions."""
    if information == "oracle":
        request = simulator.state.request
        request["predicted"] = request["output"]


def run_compiled(simulator: Simulator, policy: Heuristic) -> None:
    """Dispatch by a compiled rule until episodes have ended or another kind of decision is due."""
    prepare(simulator, policy.needs)
    request = np.zeros(NUM_REQUEST_FEATURES)
    while True:
        arguments = (
            simulator.params,
            simulator.state,
            int(policy.needs),
            policy.params,
            policy.memory,
            policy.rng,
            request,
            simulator.reasons,
        )
        if _player(arguments)(policy.decide, *arguments) < 0:
            return
        simulator.grow_logs()


def time_decisions(policy: Policy, simulator: Simulator, num_decisions: int = 200) -> FloatArray:
    """Measure single decisions on the states an episode passes through.

    Args:
        policy: Decides for one environment at a time.
        simulator: Freshly loaded; its first environment is played.
        num_decisions: How many to time at most.

    Returns:
        Seconds per decision, the observation not counted, `float64[<= num_decisions]`.
    """
    policy.reset(simulator.num_envs, 0)
    taken: list[float] = []
    while len(taken) < num_decisions and simulator.advance()[0] == DECISION:
        observations, envs = observe_batch(simulator, policy.needs)
        begin = time.perf_counter()
        chosen = policy.act(observations, envs)
        taken.append((time.perf_counter() - begin) / len(envs))
        actions = np.zeros(simulator.num_envs, np.int64)
        actions[envs] = chosen
        simulator.apply(actions)
    return np.array(taken)
