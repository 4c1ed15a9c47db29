"""Playing whole episodes of a fleet whose requests migrate under a dispatch policy and a rule.

Rules of the core are played there; one that goes by weights is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servegym.cluster.jit import kernel
from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import ALWAYS, DECISION, DONE, LOG_FULL, MIGRATE, Asks, Params, State
from servegym.policy.contract import NUM_REQUEST_FEATURES
from servegym.policy.migrating import Migrating
from servegym.policy.move_scores import choose_by_scores
from servegym.policy.observe import observe, observe_batch, prepare
from servegym.policy.policy import Decide, Heuristic
from servegym.policy.rule import compile_for_rules
from servegym.policy.run import require_whole_requests, run, tell_truth
from servegym.typing import FloatArray, UInt64Array


def make_simulator(
    spec: ClusterSpec, episodes: list[Episode], policy: Migrating, *, record: bool = False
) -> Simulator:
    """Make a simulator that goes by a policy's migration rule, or asks who moves.

    Raises:
        ConfigError: If no request can move there.
    """
    asks = Asks() if policy.rule.weights is None else Asks(migrate=ALWAYS)
    return Simulator(policy.spec(spec), episodes, record=record, asks=asks)


def run_migrating(simulator: Simulator, policy: Migrating, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    Args:
        simulator: Freshly made by `make_simulator`.
        policy: Decides; it is reset first.
        seed: Of the policy's own randomness.

    Raises:
        ConfigError: If it looks ahead as if requests stayed where they are.
    """
    weights = policy.rule.weights
    if weights is None:
        run(simulator, policy.dispatch, seed)
        return
    require_whole_requests(simulator, policy)
    policy.reset(simulator.num_envs, seed)
    prepare(simulator, policy.needs)
    tell_truth(simulator, policy.information)
    if isinstance(policy.dispatch, Heuristic):
        _run_compiled(simulator, policy.dispatch, weights)
        return
    while (simulator.advance() != DONE).any():
        _move(simulator.params, simulator.state, weights)
        observations, envs = observe_batch(simulator, policy.needs)
        answers = np.zeros(simulator.num_envs, np.int64)
        if len(envs):
            answers[envs] = policy.act(observations, envs)
        simulator.apply(answers)


@kernel
def _move(p: Params, s: State, weights: FloatArray) -> None:
    """Let all move that do at this tick, in every environment that asks."""
    for e in range(s.env.shape[0]):
        while s.env[e].decision == MIGRATE:
            apply(p, s, e, choose_by_scores(p, s, e, weights))


def _play(
    decide: Decide,
    p: Params,
    s: State,
    e: int,
    needs: int,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
    weights: FloatArray,
    request: FloatArray,
) -> int:
    """Dispatch by a compiled rule and move by weights to the end, or a full log."""
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason
        if s.env[e].decision == MIGRATE:
            apply(p, s, e, choose_by_scores(p, s, e, weights))
        else:
            observe(p, s, e, needs, request)
            apply(p, s, e, decide(s.observation[e], request, s.allowed[e], params, memory, rng))


_players: list[Callable[..., int]] = []


def _player(arguments: tuple[object, ...]) -> Callable[..., int]:
    if not _players:  # the types of the arguments never differ
        _players.append(compile_for_rules(_play, arguments))
    return _players[0]


def _run_compiled(simulator: Simulator, dispatch: Heuristic, weights: FloatArray) -> None:
    request = np.zeros(NUM_REQUEST_FEATURES)
    for env in range(simulator.num_envs):
        reason = LOG_FULL
        while reason == LOG_FULL:
            arguments = (
                simulator.params,
                simulator.state,
                env,
                int(dispatch.needs),
                dispatch.params,
                dispatch.memory[env],
                dispatch.rng[env],
                weights,
                request,
            )
            reason = _player(arguments)(dispatch.decide, *arguments)
            if reason == LOG_FULL:
                simulator.grow_logs()
        simulator.reasons[env] = reason
