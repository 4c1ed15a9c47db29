"""Search through the starts of stages: a rule decides, and wherever another start is better, it.

A sweep plays the episode once under the rule and, at each decision, copies all that is there to
play some other starts to the end, the rule deciding from then on. What is kept is the best whole
episode so far, so the end is never worse than the rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numba import typeof, types

from servegym.clairvoyant.goal import is_better
from servegym.cluster.jit import OPTIONS, compiled, helper, kernel
from servegym.cluster.rng import next_uniform
from servegym.errors import ConfigError
from servegym.typing import FloatArray, IntArray, UInt64Array
from servegym.workflow.online.kernels import advance, apply, is_allowed
from servegym.workflow.online.policy import SIGNATURE, Decide, Rule, WorkflowPolicy
from servegym.workflow.online.run import begin
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec
from servegym.workflow.online.state import DECISION, DONE, WAIT, Params, State
from servegym.workflow.online.view import can_start, view

#: Metrics that can be searched for, see docs/workflow-online.md.
JCT_MEAN, MAKESPAN, DEADLINE = range(3)
METRICS = {"jct_mean_s": JCT_MEAN, "makespan_s": MAKESPAN, "deadline_attainment": DEADLINE}


#: Other starts tried at a decision in one sweep; what is left of the budget goes into more sweeps.
_MOST_TRIES = 3.0


class RuleMemory(NamedTuple):
    """What a rule keeps, for two environments."""

    params: FloatArray  # [p]
    memory: FloatArray  # [2, m]
    stages: FloatArray  # [2, N, a]
    devices: FloatArray  # [2, D, b]
    rng: UInt64Array  # [2, 1]


@helper
def _copy_all(words: tuple[np.ndarray, ...], kept: RuleMemory) -> None:
    """Make the second environment, and what the rule keeps of it, what the first one is."""
    for array in words:
        for k in range(array.shape[1]):
            array[1, k] = array[0, k]
    for k in range(kept.memory.shape[1]):
        kept.memory[1, k] = kept.memory[0, k]
    for n in range(kept.stages.shape[1]):
        for k in range(kept.stages.shape[2]):
            kept.stages[1, n, k] = kept.stages[0, n, k]
    for n in range(kept.devices.shape[1]):
        for k in range(kept.devices.shape[2]):
            kept.devices[1, n, k] = kept.devices[0, n, k]
    kept.rng[1, 0] = kept.rng[0, 0]


@kernel
def _loss(s: State, e: int, metric: int) -> tuple[float, float]:
    """Judge an episode that is over: lower is better, and what decides between equals."""
    total_s, last_s, first_s = 0.0, -np.inf, np.inf
    weight, in_time, late_s = 0.0, 0.0, 0.0
    num_jobs = s.env[e].num_jobs
    for j in range(num_jobs):
        job = s.job[e, j]
        jct_s = job.finish_s - job.arrival_s
        total_s += jct_s
        first_s = min(first_s, job.arrival_s)
        last_s = max(last_s, job.finish_s)
        weight += job.weight
        if jct_s <= job.deadline_s:
            in_time += job.weight
        else:
            late_s += min(jct_s - job.deadline_s, job.deadline_s)
    if metric == DEADLINE:
        return -in_time / weight, late_s
    if metric == MAKESPAN:
        return last_s - first_s, total_s
    return total_s / num_jobs, 0.0


@helper
def _other_action(p: Params, s: State, own: int, rng: UInt64Array) -> int:
    """Draw an allowed action of the first environment; `own` if there is no other."""
    env = s.env[0]
    found, count = own, 0
    for i in range(env.num_ready):
        stage = s.ready[0, i]
        for d in range(env.num_devices):
            action = stage * env.num_devices + d
            if action != own and can_start(view(p, s, 0), stage, d):
                count += 1
                if next_uniform(rng) * count < 1.0:
                    found = action
    if own != WAIT and is_allowed(p, s, 0, WAIT):
        count += 1
        if next_uniform(rng) * count < 1.0:
            found = WAIT
    return found


@helper
def _decide(decide: Decide, p: Params, s: State, e: int, kept: RuleMemory) -> int:
    """Ask the rule."""
    memory, stages, devices, rng = kept.memory[e], kept.stages[e], kept.devices[e], kept.rng[e]
    return decide(view(p, s, e), kept.params, memory, stages, devices, rng)


def _sweep(
    decide: Decide,
    p: Params,
    s: State,
    words: tuple[np.ndarray, ...],
    kept: RuleMemory,
    metric: int,
    tries: float,
    kick: float,
    rng: UInt64Array,
    actions: IntArray,
    spent: IntArray,
) -> int:
    """Play the first environment, with `kick` the share of starts that are left to chance.

    Returns:
        How many decisions there were, -1 if it has no end.
    """
    best = (np.inf, np.inf)
    count = 0
    while advance(p, s, 0) == DECISION:
        if count == actions.shape[0]:
            return -1
        action = _decide(decide, p, s, 0, kept)
        num_tries = int(tries + next_uniform(rng)) + (count == 0)
        if count > 0 and next_uniform(rng) < kick:
            best = (np.inf, np.inf)  # the first other start is taken as it is
            num_tries = max(1, num_tries)
        for k in range(num_tries):
            other = action
            if count > 0 or k > 0:  # the very first play is that of the rule itself
                if spent[0] >= spent[1]:
                    break
                other = _other_action(p, s, action, rng)
                if other == action:
                    break
            _copy_all(words, kept)
            apply(p, s, 1, other)
            reason = advance(p, s, 1)
            while reason == DECISION:
                then = _decide(decide, p, s, 1, kept)
                spent[0] += 1
                if not is_allowed(p, s, 1, then):
                    break
                apply(p, s, 1, then)
                reason = advance(p, s, 1)
            if reason == DONE:
                found = _loss(s, 1, metric)
                if is_better(found, best):
                    best, action = found, other
                    spent[2] += 1
        if not is_allowed(p, s, 0, action):
            return -1
        actions[count] = action
        count += 1
        apply(p, s, 0, action)
    return count


_sweepers: list[Callable[..., int]] = []


def _sweeper(arguments: tuple[object, ...]) -> Callable[..., int]:
    if not _sweepers:  # the types of the arguments never differ
        signature = types.int64(types.FunctionType(SIGNATURE), *map(typeof, arguments))
        _sweepers.append(compiled(_sweep, signature, **OPTIONS))
    return _sweepers[0]


def best_starts(
    spec: FleetSpec,
    episodes: Sequence[Episode],
    runs: Sequence[tuple[WorkflowPolicy, Simulator]],
    metric: str,
    *,
    budget: float,
    seed: int = 0,
) -> list[Simulator]:
    """Search each episode, beginning with several rules; two at a time and more.

    Args:
        spec: Device types and rules.
        episodes: What is played.
        runs: Policies and simulators in which they played all episodes.
        metric: One of `METRICS`.
        budget: Simulation for an episode, in whole episodes.
        seed: Of the rules' own randomness, and of the search.

    Returns:
        For each episode a simulator of one environment that has played what was found.

    Raises:
        ConfigError: If none of the policies is a compiled rule.
    """
    rules = [(policy, simulator) for policy, simulator in runs if isinstance(policy, Rule)]
    if not rules:
        raise ConfigError(
            "none of the best policies is a compiled rule, from which a search could begin: name"
            " one more, such as srpt-cp"
        )

    def searched(env: int) -> Simulator:
        ranked = sorted(rules, key=lambda pair: _loss(pair[1].state, env, METRICS[metric]))
        num_decisions = [int(run.state.env[env]["num_decisions"]) for _, run in ranked]
        return _search(
            spec,
            episodes[env],
            [rule for rule, _ in ranked],
            max(num_decisions),
            metric,
            budget=budget,
            seed=seed + env,
        )

    with ThreadPoolExecutor() as pool:  # compiled code does not hold the interpreter up
        return list(pool.map(searched, range(len(episodes))))


def _search(
    spec: FleetSpec,
    episode: Episode,
    rules: Sequence[Rule],
    num_decisions: int,
    metric: str,
    *,
    budget: float,
    seed: int,
) -> Simulator:
    """Improve on rules, which take `num_decisions` at most, one after the other.

    Returns:
        A simulator of one environment that has played the best that was found.
    """
    spent = np.array([0, int(budget * num_decisions), 0], np.int64)
    rng = np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64)
    # a try plays half an episode on average
    tries = min(_MOST_TRIES, 2.0 * budget / num_decisions)
    best, least = Simulator(spec, [episode]), (np.inf, np.inf)
    for k, chosen in enumerate(itertools.cycle(rules)):
        kick = 2.0 / num_decisions if k else 0.0
        rule = replace(chosen)  # what a rule keeps is its own
        simulator = Simulator(spec, [episode, episode])
        begin(simulator, rule, seed)
        state = simulator.state
        words = tuple(array.reshape(2, -1).view(np.uint8) for array in state)
        kept = RuleMemory(rule.params, rule.memory, rule.stage_memory, rule.device_memory, rule.rng)
        actions = np.zeros(16 * num_decisions + 1024, np.int64)
        arguments = (
            simulator.params, state, words, kept, METRICS[metric], tries, kick, rng, actions, spent
        )  # fmt: skip
        count = _sweeper(arguments)(rule.decide, *arguments)
        if count < 0:
            raise ConfigError(
                f"{rule.name} does not play this episode to its end: name another rule"
            )
        found = _loss(state, 0, METRICS[metric])
        if is_better(found, least):
            best, least = _replay(spec, episode, rule, actions[:count]), found
        if spent[0] >= spent[1]:
            break
    return best


def _replay(spec: FleetSpec, episode: Episode, rule: Rule, actions: IntArray) -> Simulator:
    """Play an episode by actions that were found beginning with a rule."""
    simulator = Simulator(spec, [episode])
    begin(simulator, replace(rule))
    for action in actions:
        simulator.advance()
        simulator.apply(np.array([action]))
    simulator.advance()
    return simulator
