"""What is known of a turn when it is decided what becomes of its KV: facts, and gaps so far."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ReplicaType
from servegym.cluster.state import NUM_TIERS, STORE, Params, State
from servegym.policy.turn_scores import (
    FREE_SHARE,
    HOST_SHARE,
    KEPT_TOKENS,
    NUM_WAITING,
    RECOMPUTE_S,
    WRITING_S,
)
from servegym.typing import FloatArray, IntArray

#: Of the gaps behind calls of a tool, the latest so many are remembered.
MOST_GAPS = 256
#: Steps of a full budget of tokens that a text is taken to be computed in, at most.
_MOST_STEPS = 64


class TurnMemory(NamedTuple):
    """What has been seen of the turns of a simulator's environments.

    Axes: E environments, N requests, L tools, T replica types.
    """

    tool: IntArray  # [E, N] 1 + number of what runs before a request arrives; 0: nobody says it
    awaited: IntArray  # [E, N] the requests that turns wait for that were asked about
    num_awaited: IntArray  # [E]
    gaps_s: FloatArray  # [E, L, MOST_GAPS] seconds from turns' ends to the next ones, latest last
    num_gaps: IntArray  # [E, L]
    recompute_s: FloatArray  # [T, _MOST_STEPS + 1] of a text of so many full budgets

    @classmethod
    def of(cls, simulator: Simulator) -> TurnMemory:
        """Make it for episodes that begin."""
        num_envs, num_requests = simulator.state.request.shape
        tool = np.zeros((num_envs, num_requests), np.int64)
        for env, episode in enumerate(simulator.episodes):
            tool[env, : len(episode.table)] = episode.table.tool + 1
        num_tools = 1 + int(tool.max(initial=0))
        return cls(
            tool,
            np.zeros((num_envs, num_requests), np.int64),
            np.zeros(num_envs, np.int64),
            np.zeros((num_envs, num_tools, MOST_GAPS)),
            np.zeros((num_envs, num_tools), np.int64),
            np.array([_recompute_curve(kind) for kind in simulator.spec.types]),
        )


def _recompute_curve(kind: ReplicaType) -> FloatArray:
    """Seconds of the steps that compute a text alone, of 0, 1, ... full budgets of tokens."""
    budget = kind.max_num_batched_tokens
    steps = [kind.grid.step_s([(budget, i * budget)]) for i in range(_MOST_STEPS)]
    return np.concatenate(([0.0], np.cumsum(steps)))


@inlined
def _computing_s(curve: FloatArray, budget: int, tokens: int) -> float:
    """Seconds that computing a text takes, between two points of a curve."""
    i = tokens // budget
    if i >= curve.shape[0] - 1:
        return curve[curve.shape[0] - 1]
    return (curve[i + 1] - curve[i]) / budget * (tokens - i * budget) + curve[i]


@inlined
def _first_tier_share(p: Params, s: State, e: int, r: int) -> float:
    """Share of a replica's first tier that is filled, 0 without one."""
    for tier in range(NUM_TIERS):
        size = p.tier_num_blocks[s.replica[e, r].type_idx, tier]
        if size > 0:
            held = s.env[e].store_num_blocks if tier == STORE else s.tier[e, r, tier].num_blocks
            return held / size
    return 0.0


@inlined
def _learn(s: State, m: TurnMemory, e: int) -> None:
    """Note the gaps of turns whose next ones have come."""
    now_s, left = s.env[e].now_s, 0
    for i in range(m.num_awaited[e]):
        request = m.awaited[e, i]
        q = s.request[e, request]
        if not q.arrival_s <= now_s:  # NaN before it comes
            m.awaited[e, left] = request
            left += 1
            continue
        tool = m.tool[e, request]
        gaps_s, count = m.gaps_s[e, tool], m.num_gaps[e, tool]
        if count == MOST_GAPS:
            count -= 1
            for j in range(count):
                gaps_s[j] = gaps_s[j + 1]
        gaps_s[count] = q.arrival_s - s.request[e, q.after].finish_s
        m.num_gaps[e, tool] = count + 1
    m.num_awaited[e] = left


@kernel
def note_turn(p: Params, s: State, e: int, m: TurnMemory, facts: FloatArray) -> int:
    """A turn is asked about: write what is known of it, and await its next one.

    Args:
        p: Constants.
        s: State.
        e: Environment, in which a turn is to be decided.
        m: Learns the gaps of earlier turns that are over.
        facts: Is given `turn_scores.TURN_FACTS`, `float64[len(TURN_FACTS)]`.

    Returns:
        The row of its tool in `TurnMemory.gaps_s`.
    """
    env = s.env[e]
    q, v = s.request[e, env.deciding], s.replica[e, env.asking]
    t = v.type_idx
    _learn(s, m, e)
    m.awaited[e, m.num_awaited[e]] = q.first_after
    m.num_awaited[e] += 1
    tokens = q.table_len * p.block_size
    facts[KEPT_TOKENS] = tokens
    facts[RECOMPUTE_S] = _computing_s(m.recompute_s[t], p.max_num_batched_tokens[t], tokens)
    facts[FREE_SHARE] = (v.free_blocks - v.kept_blocks) / p.num_blocks[t]
    facts[NUM_WAITING] = v.num_waiting
    facts[HOST_SHARE] = _first_tier_share(p, s, e, env.asking)
    facts[WRITING_S] = max(0.0, v.slowed_until_s - env.now_s)
    return int(m.tool[e, q.first_after])
