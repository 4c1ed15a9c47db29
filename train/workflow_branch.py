"""What else could have been chosen, and what would have come of it: episodes that branch.

A simulator can be copied, and its noise belongs to stages and not to a stream: after one changed
decision everything that does not follow from it stays the same. So the difference between two
branches tells more of a decision than thousands of returns do.
"""

from __future__ import annotations

import numpy as np
from numba import typeof, types

from servegym.agents.workflow_policy import (
    NUM_ROWS,
    ROW_DEVICE,
    ROW_SCORE,
    ROW_STAGE,
    ROW_WIDTH,
    ROWS,
    LearnedRule,
)
from servegym.cluster.jit import OPTIONS, compiled
from servegym.typing import FloatArray, IntArray, UInt64Array
from servegym.workflow.online.kernels import advance, apply
from servegym.workflow.online.policy import SIGNATURE, Decide
from servegym.workflow.online.run import begin
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec
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
    area: FloatArray,
) -> int:
    """Take an action, then play on by the rule till the first decision from `until_s` on.

    Writes the integral of the jobs in the system up to then; between two decisions it is taken to
    grow evenly.
    """
    env = s.env[e]
    while True:
        before_s = env.now_s
        before = env.area + env.in_system * (before_s - env.area_until_s)
        apply(p, s, e, action)
        reason = advance(p, s, e)
        area[0] = env.area + env.in_system * (env.now_s - env.area_until_s)
        if env.now_s > until_s:
            area[0] = before + (area[0] - before) * (until_s - before_s) / (env.now_s - before_s)
        if reason != DECISION or env.now_s >= until_s:
            return reason
        action = decide(view(p, s, e), params, memory, stage_memory, device_memory, rng)


_players: list[object] = []


def _player(arguments: tuple[object, ...]) -> object:
    if not _players:  # the types of the arguments never differ
        signature = types.int64(types.FunctionType(SIGNATURE), *map(typeof, arguments))
        _players.append(compiled(_play_until, signature, **OPTIONS))
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
        before, area = self.counted(0), np.zeros(1)
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
                area,
            )
            _player(arguments)(rule.decide, *arguments)  # type: ignore[operator]
            after = float(area[0]) if self._objective == "jct" else self.counted(1)
            found[i] = after - before
        return found

    def counted(self, env: int) -> float:
        """Return the cost of an environment so far."""
        row = self._simulator.state.env[env]
        if self._objective == "deadline":
            return -float(row["good"])
        if self._objective == "makespan":
            return float(row["now_s"])
        return float(row["area"] + row["in_system"] * (row["now_s"] - row["area_until_s"]))


def look_ahead(
    spec: FleetSpec,
    episode: Episode,
    rule: LearnedRule,
    objective: str,
    horizon_s: float,
    *,
    most: int = 4,
) -> float:
    """Play an episode, trying the best actions of a rule in branches before each decision.

    The branches know what will come: an estimate from above of what one more step of policy
    improvement could bring.

    Args:
        spec: The fleet.
        episode: What is played.
        rule: Scores the actions, and plays on in the branches.
        objective: `jct`, `makespan` or `deadline`.
        horizon_s: How far each branch is played.
        most: Actions that are tried.

    Returns:
        Job-seconds in the system, the makespan in seconds or minus the weight of the jobs in time.
    """
    simulator = Simulator(spec, [episode, episode])
    begin(simulator, rule)
    branching = Branching(simulator, rule, objective)
    first = np.zeros(1, np.int64)
    while simulator.advance()[0] == DECISION:
        action = int(rule.act(simulator, first)[0])
        count = int(rule.memory[0][NUM_ROWS])
        rows = rule.memory[0][ROWS : ROWS + count * ROW_WIDTH].reshape(count, ROW_WIDTH)
        num_devices = simulator.state.env[0]["num_devices"]
        actions = (rows[:, ROW_STAGE] * num_devices + rows[:, ROW_DEVICE]).astype(np.int64)
        order = np.argsort(-rows[:, ROW_SCORE], kind="stable")[:most]
        tried = actions[order][actions[order] != action]
        if simulator.state.env[0]["num_started"] > 0 and action != WAIT:
            tried = np.append(tried, WAIT)
        tried = np.append(action, tried)
        if len(tried) > 1:
            costs = branching.costs(tried, horizon_s)
            # the rule's own choice, unless another is really better
            if costs.min() < costs[0] - 1e-9 * abs(costs[0]):
                action = int(tried[costs.argmin()])
        simulator.state.env["deciding"][1] = 0
        simulator.apply(np.array([action, WAIT]))
    return branching.counted(0)
