"""Playing whole episodes in compiled code while keeping what was chosen from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import typeof, types

from servegym.agents.workflow_features import NUM_STAGE_FEATURES, describe_stage
from servegym.agents.workflow_policy import (
    CHOSEN,
    NUM_ROWS,
    ROW_BASE,
    ROW_DEVICE,
    ROW_FEATURES,
    ROW_STAGE,
    ROW_WIDTH,
    ROWS,
    LearnedRule,
)
from servegym.cluster.jit import OPTIONS, compiled, kernel
from servegym.typing import Float32Array, FloatArray, IntArray, UInt64Array
from servegym.workflow.online.kernels import advance, apply
from servegym.workflow.online.policy import SIGNATURE, Decide
from servegym.workflow.online.run import begin
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec
from servegym.workflow.online.state import DECISION, Params, State
from servegym.workflow.online.view import View, view


class Log(NamedTuple):
    """Decisions of one environment, as they are kept."""

    rows: Float32Array  # [most rows, ROW_WIDTH] pairs of all decisions
    first: IntArray  # [most decisions + 1] where each decision's pairs begin
    chosen: IntArray  # [most decisions] which of its pairs; their number for waiting
    may_wait: IntArray  # [most decisions]
    time_s: FloatArray  # [most decisions]
    area: FloatArray  # [most decisions] integral of the jobs in the system
    good: FloatArray  # [most decisions] weight of the jobs that ended in time


def _collect(
    decide: Decide,
    p: Params,
    s: State,
    e: int,
    params: FloatArray,
    memory: FloatArray,
    stage_memory: FloatArray,
    device_memory: FloatArray,
    rng: UInt64Array,
    log: Log,
) -> int:
    """Play an environment to its end; return how many decisions were kept."""
    kept, end = 0, 0
    while advance(p, s, e) == DECISION:
        env = s.env[e]
        may_wait = env.num_started > 0
        action = decide(view(p, s, e), params, memory, stage_memory, device_memory, rng)
        count = int(memory[NUM_ROWS])
        if kept < log.chosen.shape[0] and end + count <= log.rows.shape[0]:
            for r in range(count):
                for k in range(ROW_WIDTH):
                    log.rows[end + r, k] = memory[ROWS + r * ROW_WIDTH + k]
            log.first[kept] = end
            log.chosen[kept] = int(memory[CHOSEN])
            log.may_wait[kept] = may_wait
            log.time_s[kept] = env.now_s
            log.area[kept] = env.area + env.in_system * (env.now_s - env.area_until_s)
            log.good[kept] = env.good
            kept += 1
            end += count
            log.first[kept] = end
        apply(p, s, e, action)
    return kept


_collectors: list[object] = []


def _collector(arguments: tuple[object, ...]) -> object:
    if not _collectors:  # the types of the arguments never differ
        signature = types.int64(types.FunctionType(SIGNATURE), *map(typeof, arguments))
        _collectors.append(compiled(_collect, signature, **OPTIONS))
    return _collectors[0]


@kernel
def _describe_stages(w: View, tau_s: float, out: FloatArray, row: FloatArray) -> None:
    for v in range(w.env[0].num_stages):
        describe_stage(w, v, tau_s, row, 0)
        for k in range(NUM_STAGE_FEATURES):
            out[v, k] = row[k]


class Played(NamedTuple):
    """One episode as it was played."""

    features: Float32Array  # [P, NUM_PAIR_FEATURES]
    base: Float32Array  # [P]
    stage: IntArray  # [P]
    device: IntArray  # [P]
    first: IntArray  # [D + 1] where each decision's pairs begin
    chosen: IntArray  # [D] which of its pairs; their number for waiting
    may_wait: IntArray  # [D]
    time_s: FloatArray  # [D]
    earned: FloatArray  # [D + 1] sum of rewards before each decision, and of all
    end_s: float
    stages: Float32Array  # [N, NUM_STAGE_FEATURES]
    job: IntArray  # [N]
    hidden: IntArray  # [N]
    parent: IntArray  # [M] edges to children that are not hidden
    child: IntArray  # [M]
    depth: int


def play(
    spec: FleetSpec,
    episodes: Sequence[Episode],
    policy: LearnedRule,
    *,
    objective: str,
    tau_s: float,
    seed: int = 0,
    max_decisions: int = 8192,
    max_rows: int = 262_144,
) -> list[Played]:
    """Play episodes to their ends.

    Args:
        spec: The fleet.
        episodes: What is played.
        policy: Plays; its choices are kept.
        objective: `jct`: minus the integral of the jobs in the system is earned; `makespan`: minus
            the time; `deadline`: the weight of jobs that ended in time.
        tau_s: Unit of times.
        seed: Of the policy's draws.
        max_decisions: Kept of an episode; what follows is played but not kept.
        max_rows: Pairs kept of an episode.
    """
    simulator = Simulator(spec, episodes)
    begin(simulator, policy, seed)
    log = Log(
        np.zeros((max_rows, ROW_WIDTH), np.float32),
        np.zeros(max_decisions + 1, np.int64),
        np.zeros(max_decisions, np.int64),
        np.zeros(max_decisions, np.int64),
        np.zeros(max_decisions),
        np.zeros(max_decisions),
        np.zeros(max_decisions),
    )
    found = []
    for env in range(len(episodes)):
        arguments = (
            simulator.params,
            simulator.state,
            env,
            policy.params,
            policy.memory[env],
            policy.stage_memory[env],
            policy.device_memory[env],
            policy.rng[env],
            log,
        )
        kept = int(_collector(arguments)(policy.decide, *arguments))  # type: ignore[operator]
        found.append(_played(simulator, env, log, kept, objective, tau_s))
    return found


def _played(
    simulator: Simulator, env: int, log: Log, kept: int, objective: str, tau_s: float
) -> Played:
    w = simulator.view(env)
    totals = w.env[0]
    end = int(log.first[kept])
    rows = log.rows[:end]
    now_s, area = float(totals["now_s"]), float(totals["area"])
    earned = {
        "jct": -np.append(log.area[:kept], area),
        "makespan": -np.append(log.time_s[:kept], now_s),
        "deadline": np.append(log.good[:kept], float(totals["good"])),
    }[objective]
    num_stages, num_edges = int(totals["num_stages"]), int(totals["num_edges"])
    stages = np.zeros((num_stages, NUM_STAGE_FEATURES))
    _describe_stages(w, tau_s, stages, np.zeros(NUM_STAGE_FEATURES))
    hidden = w.stage["hidden"][:num_stages].copy()
    edges = w.edge[:num_edges]
    edges = edges[hidden[edges["child"]] == 0]
    parent, child = edges["parent"].copy(), edges["child"].copy()
    return Played(
        rows[:, ROW_FEATURES:].copy(),
        rows[:, ROW_BASE].copy(),
        rows[:, ROW_STAGE].astype(np.int64),
        rows[:, ROW_DEVICE].astype(np.int64),
        log.first[: kept + 1].copy(),
        log.chosen[:kept].copy(),
        log.may_wait[:kept].copy(),
        log.time_s[:kept].copy(),
        earned,
        now_s,
        stages.astype(np.float32),
        w.stage["job"][:num_stages].copy(),
        hidden,
        parent,
        child,
        _depth(num_stages, parent, child),
    )


def _depth(num_stages: int, parent: IntArray, child: IntArray) -> int:
    """Count the stages on the longest way; parents have smaller numbers than their children."""
    ways = np.ones(num_stages, np.int64)
    _lengthen(ways, parent, child)
    return int(ways.max())


@kernel
def _lengthen(ways: IntArray, parent: IntArray, child: IntArray) -> None:
    for i in range(parent.shape[0] - 1, -1, -1):
        ways[parent[i]] = max(ways[parent[i]], 1 + ways[child[i]])
