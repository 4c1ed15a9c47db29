"""Playing whole episodes under an online policy: rules in compiled code, others in batches."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numba import typeof, types

from servegym.cluster.jit import OPTIONS, compiled
from servegym.errors import InvalidAction
from servegym.typing import FloatArray, UInt64Array
from servegym.workflow.online.kernels import advance, apply, is_allowed
from servegym.workflow.online.policy import SIGNATURE, Decide, Rule, WorkflowPolicy
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import DECISION, STUCK, Params, State
from servegym.workflow.online.view import view

_BAD_ACTION = STUCK + 1
#: Decisions that are timed at most.
_TIMED = 200


def _play(
    decide: Decide,
    p: Params,
    s: State,
    e: int,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
    rng: UInt64Array,
) -> int:
    """Run one environment to its end under a compiled rule; stop at an action it may not take."""
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason
        action = decide(view(p, s, e), params, memory, stage_memory, device_memory, rng)
        if not is_allowed(p, s, e, action):
            s.env[e].refused = action
            return _BAD_ACTION
        apply(p, s, e, action)


_players: list[Callable[..., int]] = []


def _player(arguments: tuple[object, ...]) -> Callable[..., int]:
    if not _players:  # the types of the arguments never differ
        signature = types.int64(types.FunctionType(SIGNATURE), *map(typeof, arguments))
        _players.append(compiled(_play, signature, **OPTIONS))
    return _players[0]


def run(simulator: Simulator, policy: WorkflowPolicy, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    An oracle is shown the truth: true durations and lengths as the expected ones, and no stage
    hidden.

    Args:
        simulator: Freshly loaded.
        policy: Decides; it is reset first.
        seed: Of the policy's own randomness.

    Raises:
        InvalidAction: If it starts what cannot start, or waits for nothing.
    """
    begin(simulator, policy, seed)
    if isinstance(policy, Rule):
        for env in range(simulator.num_envs):
            arguments = (
                simulator.params,
                simulator.state,
                env,
                policy.params,
                policy.memory[env],
                policy.stage_memory[env],
                policy.device_memory[env],
                policy.rng[env],
            )
            reason = _player(arguments)(policy.decide, *arguments)
            if reason == _BAD_ACTION:
                refused = int(simulator.state.env[env]["refused"])
                raise InvalidAction(f"{policy.name}: {simulator.refusal(env, refused)}")
            simulator.reasons[env] = reason
        return
    while (simulator.advance() == DECISION).any():
        envs = np.flatnonzero(simulator.reasons == DECISION)
        actions = np.zeros(simulator.num_envs, np.int64)
        actions[envs] = policy.act(simulator, envs)
        simulator.apply(actions)


def begin(simulator: Simulator, policy: WorkflowPolicy, seed: int = 0) -> None:
    """Prepare a freshly loaded simulator and a policy for each other; `run` does so itself."""
    if policy.information == "oracle":
        simulator.tell_truth()
    simulator.state.env["asks_when_ready"] = policy.asks_when_ready
    policy.reset(simulator, seed)


def time_decisions(policy: WorkflowPolicy, simulator: Simulator) -> FloatArray:
    """Measure single decisions, called from Python, on the states an episode passes through.

    Args:
        policy: Decides for one environment at a time.
        simulator: Freshly loaded, with one environment.

    Returns:
        Seconds per decision, `float64[n]`, at most `_TIMED` of them.
    """
    begin(simulator, policy)
    taken: list[float] = []
    first = np.zeros(1, np.int64)
    while len(taken) < _TIMED and simulator.advance()[0] == DECISION:
        start_s = time.perf_counter()
        chosen = policy.act(simulator, first)
        taken.append(time.perf_counter() - start_s)
        simulator.apply(chosen)
    return np.array(taken)
