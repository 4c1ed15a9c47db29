"""What else could have been chosen, and what would have come of it: episodes that branch.

A simulator can be copied, and its noise belongs to stages and not to a stream: after one changed
decision everything that does not follow from it stays the same. So the difference between two
branches tells more of a decision than thousands of returns do.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, typeof, types

from servegym.agents.workflow_policy import (
    NUM_ROWS,
    ROW_DEVICE,
    ROW_STAGE,
    ROW_WIDTH,
    ROWS,
    LearnedRule,
)
from servegym.cluster.jit import OPTIONS
from servegym.typing import FloatArray, IntArray, UInt64Array
from servegym.workflow.online.kernels import advance, apply
from servegym.workflow.online.policy import SIGNATURE, Decide
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.state import DECISION, WAIT, Params, State
from servegym.workflow.online.view import view


def _play_until(
    decide: Decide,
    p: Params,
    s: State,
    e: int,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
    rng: UInt64Array,
    action: int,
    until_s: float,
) -> int:
    """Take an action, then play on by the rule till the first decision from `until_s` on."""
    apply(p, s, e, action)
    while True:
        reason = advance(p, s, e)
        if reason != DECISION or s.env[e].now_s >= until_s:
            return reason
        apply(
            p,
            s,
            e,
            decide(view(p, s, e), params, memory, stage_memory, device_memory, rng),
        )


_players: list[object] = []


def _player(arguments: tuple[object, ...]) -> object:
    if not _players:  # the types of the arguments never differ
        signature = types.int64(types.FunctionType(SIGNATURE), *map(typeof, arguments))
        _players.append(njit(signature, **OPTIONS)(_play_until))
    return _players[0]


class Branching:
    """Tries actions in a copy of an environment, the rule playing on after each.

    Args:
        simulator: Has one environment to play in and a second one, of the same size, to try in.
        rule: Plays on; it must have been prepared by `workflow.online.run.begin`.
        objective: What is counted: `jct`, `makespan` or `deadline`.
    """

    def __init__(self, simulator: Simulator, rule: LearnedRule, objective: str) -> None:
        self._simulator, self._rule, self._objective = simulator, rule, objective

    def costs(self, actions: IntArray, horizon_s: float) -> FloatArray:
        """Try actions that are allowed now; the environment stays as it is.

        Args:
            actions: To try, `int64[n]`.
            horizon_s: How far ahead is played; inf plays to the end.

        Returns:
            Job-seconds in the system, the end of the last job, or minus the weight of the jobs
            that ended in time, from now on, `float64[n]`.
        """
        state, rule = self._simulator.state, self._rule
        until_s = float(state.env[0]["now_s"]) + horizon_s
        before = self._counted(0, until_s)
        found = np.empty(len(actions))
        for i, action in enumerate(actions.tolist()):
            for array in state:
                array[1] = array[0]
            rule.memory[1, :ROWS] = rule.memory[0, :ROWS]
            rule.stage_memory[1] = rule.stage_memory[0]
            arguments = (
                self._simulator.params,
                state,
                1,
                rule.params,
                rule.memory[1],
                rule.stage_memory[1],
                rule.device_memory[1],
                rule.rng[1],
                action,
                until_s,
            )
            _player(arguments)(rule.decide, *arguments)  # type: ignore[operator]
            found[i] = self._counted(1, until_s) - before
        return found

    def _counted(self, env: int, until_s: float) -> float:
        row = self._simulator.state.env[env]
        if self._objective == "deadline":
            return -float(row["good"])
        if self._objective == "makespan":
            return float(row["now_s"])
        # what has been played beyond the horizon counts for none of the branches
        stop_s = min(until_s, float(row["now_s"])) if math.isfinite(until_s) else row["now_s"]
        return float(row["area"] + row["in_system"] * (stop_s - row["area_until_s"]))


class Choice(NamedTuple):
    """Actions of a decision, in the order of the rule's rows; waiting last, where it is allowed."""

    actions: IntArray
    rows: IntArray


def choices_of(simulator: Simulator, rule: LearnedRule, env: int = 0) -> Choice:
    """List what the rule has just chosen from."""
    count = int(rule.memory[env][NUM_ROWS])
    rows = rule.memory[env][ROWS : ROWS + count * ROW_WIDTH].reshape(count, ROW_WIDTH)
    totals = simulator.state.env[env]
    actions = rows[:, ROW_STAGE] * totals["num_devices"] + rows[:, ROW_DEVICE]
    found = actions.astype(np.int64)
    if totals["num_started"] > 0:
        found = np.append(found, WAIT)
    return Choice(found, np.arange(len(found)))
