"""Playing whole episodes under a dispatch policy and a rule for the KV of ended turns.

Where a compiled rule dispatches and weights say what becomes of turns, all of it is compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from servegym.cluster.kernels import advance, apply
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import (
    DECISION,
    DONE,
    LOG_FULL,
    OFFLOAD,
    RETAIN,
    WHERE_IT_MATTERS,
    Asks,
    Params,
    State,
)
from servegym.cluster.turns import may_retain
from servegym.errors import ConfigError
from servegym.policy.contract import NUM_REQUEST_FEATURES, Group
from servegym.policy.observe import observe, observe_batch, prepare
from servegym.policy.policy import Decide, Heuristic, Observations
from servegym.policy.retention import Kept, Turn
from servegym.policy.rule import compile_for_rules
from servegym.policy.run import require_whole_requests, run_compiled, tell_truth
from servegym.policy.turn_memory import TurnMemory, note_turn
from servegym.policy.turn_scores import (
    NUM_TURN_TERMS,
    TURN_FACTS,
    answer_by_scores,
    write_terms,
)
from servegym.typing import FloatArray, UInt64Array


def make_simulator(
    spec: ClusterSpec, episodes: list[Episode], *, record: bool = False
) -> Simulator:
    """Make a simulator that asks what becomes of the KV of ended turns.

    Raises:
        ConfigError: If nothing is kept of them anyway, or requests move between replicas.
    """
    check_retention(spec, "a retention rule", "take the dispatch policy alone")
    return Simulator(spec, episodes, record=record, asks=Asks(retain=WHERE_IT_MATTERS))


def check_retention(spec: ClusterSpec, what: str, instead: str) -> None:
    """Refuse clusters where nobody can say what becomes of the KV of ended turns.

    Args:
        spec: The cluster.
        what: Who would say it, at the beginning of a sentence.
        instead: What to do, at its end.
    """
    if spec.disaggregated or spec.migrates:
        raise ConfigError(
            f"{what} and requests that move between replicas do not go together yet: {instead}, or "
            "take a cluster in which none moves"
        )
    if not spec.prefix_caching:
        raise ConfigError(
            f"{what} is about blocks of the prefix cache, which is off: turn it on, or {instead}"
        )


def run_kept(simulator: Simulator, policy: Kept, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    Args:
        simulator: Freshly made by `make_simulator`.
        policy: Decides; it is reset first.
        seed: Of the policy's own randomness.
    """
    require_whole_requests(simulator, policy)
    policy.reset(simulator.num_envs, seed)
    tell_truth(simulator, policy.dispatch.information)
    dispatch, weights = policy.dispatch, policy.retention.weights
    compiled = isinstance(dispatch, Heuristic) and not policy.needs & Group.WHAT_IF
    if compiled and weights is not None:
        assert isinstance(dispatch, Heuristic)
        _run_by_weights(simulator, dispatch, weights)
        return
    turns = Turns(simulator)
    while True:
        if compiled:
            assert isinstance(dispatch, Heuristic)
            run_compiled(simulator, dispatch)
        elif (simulator.advance() == DONE).all():
            return
        due = simulator.reasons == DECISION
        if not due.any():
            return
        answers = np.zeros(simulator.num_envs, np.int64)
        asked = due & (simulator.state.env["decision"] == RETAIN)
        for env in np.flatnonzero(asked).tolist():
            turn = turns.due(env, tell=policy.retention.information == "oracle")
            answers[env], keep_s = policy.retention.retain(turn)
            simulator.state.env["keep_s"][env] = keep_s
        if (due & ~asked).any():
            observations, envs = observe_batch(simulator, policy.needs)
            rows = ~asked[envs]
            seen = Observations(*(part[rows] for part in observations))
            answers[envs[rows]] = policy.act(seen, envs[rows])
        simulator.apply(answers)


def _play(
    decide: Decide,
    p: Params,
    s: State,
    e: int,
    needs: int,
    params: FloatArray,
    memory: FloatArray,
    rng: UInt64Array,
    m: TurnMemory,
    weights: FloatArray,
    facts: FloatArray,
    terms: FloatArray,
    request: FloatArray,
) -> int:
    """Dispatch by a compiled rule and retain by weights to the end, or a full log."""
    while True:
        reason = advance(p, s, e)
        if reason != DECISION:
            return reason
        if s.env[e].decision == RETAIN:
            tool = note_turn(p, s, e, m, facts)
            write_terms(facts, m.gaps_s[e, tool, : m.num_gaps[e, tool]], terms)
            tiered = may_retain(p, s, e, s.env[e].asking, OFFLOAD)
            answer, s.env[e].keep_s = answer_by_scores(weights, terms, tiered)
        else:
            observe(p, s, e, needs, request)
            answer = decide(s.observation[e], request, s.allowed[e], params, memory, rng)
        apply(p, s, e, answer)


_players: list[Callable[..., int]] = []


def _player(arguments: tuple[object, ...]) -> Callable[..., int]:
    if not _players:  # the types of the arguments never differ
        _players.append(compile_for_rules(_play, arguments))
    return _players[0]


def _run_by_weights(simulator: Simulator, dispatch: Heuristic, weights: FloatArray) -> None:
    prepare(simulator, dispatch.needs)
    memory, request = TurnMemory.of(simulator), np.zeros(NUM_REQUEST_FEATURES)
    facts, terms = np.zeros(len(TURN_FACTS)), np.zeros(NUM_TURN_TERMS)
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
                memory,
                weights,
                facts,
                terms,
                request,
            )
            reason = _player(arguments)(dispatch.decide, *arguments)
            if reason == LOG_FULL:
                simulator.grow_logs()
        simulator.reasons[env] = reason


class Turns:
    """The turns of a simulator's episodes, as rules are told of them.

    Args:
        simulator: Freshly loaded.
    """

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._memory = TurnMemory.of(simulator)

    def due(self, env: int, *, tell: bool) -> Turn:
        """Return the turn that is to be decided; `tell` when the next one will come."""
        simulator, memory = self._simulator, self._memory
        spec, state = simulator.spec, simulator.state.env[env]
        facts = np.zeros(len(TURN_FACTS))
        tool = note_turn(simulator.params, simulator.state, env, memory, facts)
        known = dict(zip(TURN_FACTS, facts.tolist(), strict=True))
        request = int(state["deciding"])
        row = simulator.state.request[env, request]
        kind = spec.types[int(simulator.episodes[env].type_idx[int(state["asking"])])]
        return Turn(
            now_s=float(state["now_s"]),
            kept_tokens=int(known.pop("kept_tokens")),
            kv_share=int(row["table_len"]) / kind.num_blocks,
            tiered=any((kind.host_kv, kind.disk_kv, spec.tiers.store)),
            tool=tool - 1,
            gaps_s=memory.gaps_s[env, tool, : memory.num_gaps[env, tool]].copy(),
            back_s=self._back_s(env, request) if tell else math.nan,
            num_waiting=int(known.pop("num_waiting")),
            **known,
        )

    def _back_s(self, env: int, request: int) -> float:
        """Seconds until the first of those that wait for a request comes."""
        table = self._simulator.episodes[env].table
        return float(table.delay_s[table.after == request].min())
