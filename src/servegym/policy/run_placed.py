"""Playing whole episodes of a disaggregated fleet under a dispatch policy and a placement rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import (
    DECISION,
    DONE,
    LOG_FULL,
    PLACE,
    WHERE_IT_MATTERS,
    Asks,
    Params,
    State,
)
from servegym.errors import ConfigError
from servegym.policy.contract import NUM_REQUEST_FEATURES
from servegym.policy.observe import observe, observe_batch, prepare
from servegym.policy.placed import Placed
from servegym.policy.policy import Decide, Heuristic, Observations
from servegym.policy.rule import compile_for_rules
from servegym.policy.run import require_whole_requests, tell_truth
from servegym.typing import FloatArray, UInt64Array


def make_simulator(
    spec: ClusterSpec, episodes: list[Episode], *, record: bool = False
) -> Simulator:
    """Make a simulator that asks where requests decode.

    Raises:
        ConfigError: If all its replicas do all of a request.
    """
    if not spec.disaggregated:
        raise ConfigError(
            "a placement rule says where requests decode that are prefilled elsewhere, but all "
            "replicas here have the role mixed: take the dispatch policy alone"
        )
    return Simulator(spec, episodes, record=record, asks=Asks(place=WHERE_IT_MATTERS))


def run_placed(simulator: Simulator, policy: Placed, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    Args:
        simulator: Freshly made by `make_simulator`.
        policy: Decides; it is reset first.
        seed: Of the policy's own randomness.

    Raises:
        ConfigError: If it looks ahead as if a replica did all of a request.
    """
    require_whole_requests(simulator, policy)
    policy.reset(simulator.num_envs, seed)
    prepare(simulator, policy.needs)
    tell_truth(simulator, policy.information)
    if isinstance(policy.dispatch, Heuristic):
        _run_compiled(simulator, policy, policy.dispatch)
        return
    while (simulator.advance() != DONE).any():
        observations, envs = observe_batch(simulator, policy.needs)
        actions = np.zeros(simulator.num_envs, np.int64)
        places = simulator.state.env["decision"][envs] == PLACE
        for one, rows in ((policy.dispatch, ~places), (policy.place, places)):
            if rows.any():
                seen = Observations(*(part[rows] for part in observations))
                actions[envs[rows]] = one.act(seen, envs[rows])
        simulator.apply(actions)


def _play(
    dispatch: Decide,
    place: Decide,
    p: Params,
    s: State,
    e: int,
    needs: int,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
    place_params: FloatArray,
    place_memory: FloatArray,
    place_rng: UInt64Array,
    request: FloatArray,
) -> int:
    """Dispatch and place by compiled rules to the end, or a full log."""
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason
        observe(p, s, e, needs, request)
        view, allowed = s.observation[e], s.allowed[e]
        if s.env[e].decision == PLACE:
            answer = place(view, request, allowed, place_params, place_memory, place_rng)
        else:
            answer = dispatch(view, request, allowed, params, memory, rng)
        apply(p, s, e, answer)


_players: list[Callable[..., int]] = []


def _player(arguments: tuple[object, ...]) -> Callable[..., int]:
    if not _players:  # the types of the arguments never differ
        _players.append(compile_for_rules(_play, arguments, num_rules=2))
    return _players[0]


def _run_compiled(simulator: Simulator, policy: Placed, dispatch: Heuristic) -> None:
    place, request = policy.place, np.zeros(NUM_REQUEST_FEATURES)
    for env in range(simulator.num_envs):
        reason = LOG_FULL
        while reason == LOG_FULL:
            arguments = (
                simulator.params,
                simulator.state,
                env,
                int(policy.needs),
                dispatch.params,
                dispatch.memory[env],
                dispatch.rng[env],
                place.params,
                place.memory[env],
                place.rng[env],
                request,
            )
            reason = _player(arguments)(dispatch.decide, place.decide, *arguments)
            if reason == LOG_FULL:
                simulator.grow_logs()
        simulator.reasons[env] = reason
