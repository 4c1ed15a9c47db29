"""The command `servegym compile`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from numba.core.event import install_listener
from rich.table import Table

import servegym
from servegym.cluster import jit
from servegym.cluster.compile_notice import CompileCounter
from servegym.cluster.kernel_cache import places
from servegym.commands.console import make_console
from servegym.errors import ConfigError
from servegym.scenario import load_scenario

Part = Literal[
    "dispatch", "migration", "tiers", "orders", "jobs", "schedules", "bounds", "router", "live"
]


def compile_dispatch() -> None:
    """Simulator, rules and planners, environments of dispatchers."""
    from servegym.baselines.registry import policy
    from servegym.baselines.score import score_policy
    from servegym.cluster.simulator import Simulator
    from servegym.policy.compiled_network import rehearse
    from servegym.policy.run import run

    scenario = load_scenario("mixed-chat")
    for name, record in (
        ("least-outstanding", False),
        ("class-aware", False),
        ("llm-d-predicted", False),
        ("what-if", False),
        ("what-if-sampled", False),
        ("random", True),
    ):
        episode = scenario.episode(0, num_requests=8)
        run(Simulator(scenario.spec, [episode], record=record), policy(name))
    run(Simulator(scenario.spec, [episode]), score_policy("outstanding_requests"))
    play_environments("servegym/Dispatch-v1", num_requests=8)
    rehearse()
    if find_spec("torch"):
        from servegym.train import compiled_loss

        compiled_loss.rehearse()
    compile_placed()


def compile_placed() -> None:
    """Fleets in which requests are prefilled on one replica and decode on another."""
    from servegym.envs import cluster_v0
    from servegym.export.resolve import resolve_dispatch
    from servegym.policy.placed import Placed
    from servegym.policy.run_placed import make_simulator, run_placed

    scenario, placed = load_scenario("pd-unequal"), resolve_dispatch("splitwise+splitwise")
    assert isinstance(placed, Placed)
    run_placed(make_simulator(scenario.spec, [scenario.episode(0, num_requests=16)]), placed)
    play_environments("servegym/Cluster-v0", scenario="pd-unequal", num_requests=16)
    cluster_v0.parallel_env("pd-unequal", num_requests=16).reset(seed=0)


def compile_migration() -> None:
    """Requests that move to other replicas, and who controls them; it needs `dispatch`, too."""
    from servegym.baselines.registry import policy
    from servegym.policy.migrating import Migrating
    from servegym.policy.move_scores import by_freeness, scored_moves
    from servegym.policy.run_migrating import make_simulator, run_migrating

    scenario = load_scenario("near-full-kv")
    rule = scored_moves(by_freeness(3.0, 3.0, waiting_first=True), "scored")
    scored = Migrating(policy("llumnix"), rule, "scored")
    run_migrating(
        make_simulator(scenario.spec, [scenario.episode(0, num_requests=8)], scored), scored
    )
    play_environments("servegym/Cluster-v0", scenario="near-full-kv", num_requests=16)


def compile_tiers() -> None:
    """KV behind the GPUs, and what becomes of that of ended turns; it needs `dispatch`, too."""
    from servegym.envs import cluster_v0
    from servegym.export.resolve import resolve_dispatch
    from servegym.policy.retention import Kept
    from servegym.policy.run_kept import make_simulator, run_kept
    from servegym.policy.turn_scores import NUM_TURN_TERMS, TurnWeights, scored_turns

    scenario, kept = load_scenario("agents-tiers"), resolve_dispatch("prefix-load+by-tool")
    assert isinstance(kept, Kept)
    nothing = TurnWeights(*np.zeros((len(TurnWeights._fields), NUM_TURN_TERMS)))
    scored = Kept(kept.dispatch, scored_turns(nothing, "scored"), "scored")
    for each in (kept, scored):
        run_kept(make_simulator(scenario.spec, [scenario.episode(0, num_requests=16)]), each)
    play_environments("servegym/Cluster-v0", scenario="agents-tiers", num_requests=16)
    cluster_v0.parallel_env("agents-tiers", num_requests=16).reset(seed=0)


def compile_orders() -> None:
    """Orders inside an engine: rules, learned ones and their search, environments."""
    from servegym.baselines.ordering.registry import ordering_policy
    from servegym.policy.ordering import NUM_ORDERING_FEATURES
    from servegym.policy.play_perceptron import Perceptrons, play_perceptrons
    from servegym.policy.run_ordering import make_simulator, run_ordering

    scenario = load_scenario("kv-starved")
    episodes = [scenario.episode(0, num_requests=16)]
    srpt = ordering_policy("srpt")
    run_ordering(make_simulator(scenario.spec, episodes, srpt), srpt)
    play_perceptrons(scenario.spec, episodes, Perceptrons.zeros(NUM_ORDERING_FEATURES, 4, 2))
    play_environments("servegym/Preemption-v0", num_requests=16)
    compile_fleets()


def compile_fleets() -> None:
    """Fleets of engines with orders: pairs and their search, one agent and many."""
    from servegym.envs import cluster_v0
    from servegym.export.resolve import resolve_dispatch
    from servegym.policy.ordering import NUM_ORDERING_FEATURES
    from servegym.policy.pair import Pair
    from servegym.policy.play_fleet import Dispatchers, play_fleets
    from servegym.policy.play_perceptron import Orders, Perceptrons
    from servegym.policy.replica_inputs import NUM_INPUTS
    from servegym.policy.run_pair import make_simulator, run_pair

    scenario, pair = load_scenario("kv-starved-fleet"), resolve_dispatch("least-outstanding+srpt")
    assert isinstance(pair, Pair)
    episodes = [scenario.episode(0, num_requests=16)]
    run_pair(make_simulator(scenario.spec, episodes, pair), pair)
    play_environments("servegym/Cluster-v0", num_requests=16)
    cluster_v0.parallel_env(num_requests=16).reset(seed=0)
    dispatchers = Dispatchers(np.ones((1, 3)), Perceptrons.zeros(NUM_INPUTS, 2, 1))
    orders = Perceptrons.zeros(NUM_ORDERING_FEATURES, 4, 2)
    play_fleets(scenario.spec, episodes, dispatchers, Orders.of(orders))


def compile_jobs() -> None:
    """Jobs that arrive over time: rules, learned schedulers, environments."""
    from servegym.agents.workflow_features import NUM_PAIR_FEATURES
    from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
    from servegym.baselines.workflow.online.registry import online_rule
    from servegym.workflow.online.run import run
    from servegym.workflow.online.simulator import Simulator
    from servegym.workflow_scenario import load_workflow_scenario

    scenario = load_workflow_scenario("text-to-sql")
    learned = learned_rule(WorkflowWeights("srpt-cp", 1.0, 1.0, np.zeros(NUM_PAIR_FEATURES)))
    for policy in (online_rule("fifo"), online_rule("heft-replan"), learned):
        run(Simulator(scenario.spec, [scenario.episode(0, num_jobs=3)]), policy)
    if find_spec("torch"):
        from servegym.train.workflow_rollout import play

        play(
            scenario.spec,
            [scenario.episode(0, num_jobs=3)],
            learned,
            objective="jct",
            tau_s=1.0,
            max_decisions=64,
            max_rows=1024,
        )
    play_environments("servegym/Workflow-v0", num_jobs=3)


def compile_schedules() -> None:
    """Schedules of one DAG, of a job shop and of one machine."""
    from servegym.baselines.workflow.registry import workflow_rule
    from servegym.workflow.generate import RandomDag, random_job_shop
    from servegym.workflow.tardiness import random_single_machine

    for name in ("heft", "cpop", "peft", "min-min"):
        workflow_rule(name)(RandomDag(num_tasks=8).sample(0))
    workflow_rule("mwkr")(random_job_shop(2, 2, 0))
    workflow_rule("edd+ls")(random_single_machine(4, 0.5, 0.5, 0))


def compile_bounds() -> None:
    """Clairvoyant searches: of requests whose replicas can be played alone, and of all others."""
    from servegym.problems.registry import load_problem

    for name in ("azure-conv-fit", "mixed-chat", "kv-starved", "text-to-sql"):
        problem, scenario = load_problem(name)
        rule = problem.resolve(problem.default_policy)
        problem.episodes(scenario, [0], num_units=8).clairvoyant([rule], budget=2.0)


def compile_router() -> None:
    """What the router runs: its state, its reading of prompts, and every rule that can be live."""
    from servegym.baselines.placement import PLACEMENTS
    from servegym.baselines.registry import RULES
    from servegym.policy.contract import Group
    from servegym.serve.dispatcher import DispatchConfig, Dispatcher
    from servegym.serve.facts import Rates, fleet_facts
    from servegym.serve.loaded_policy import load_policy
    from servegym.serve.runtime import RuntimeConfig
    from servegym.serve.state import rehearse_inference

    rehearse_inference()
    facts = fleet_facts([Rates(prefill_tokens_per_s=1.0, decode_step_s=1.0)] * 2)
    for name in RULES:
        rule = RULES.make(name)
        if rule.information == "oracle" or rule.needs & Group.WHAT_IF:
            continue  # a simulator's alone
        runtime = RuntimeConfig(policy=name, fallback="least-outstanding")
        dispatcher = Dispatcher(DispatchConfig(runtime=runtime), ["a", "b"], facts)
        job = dispatcher.arrive("a prompt " * 100, key="key", max_tokens=1)
        dispatcher.decide(job)
        dispatcher.first_token(job)
        dispatcher.finish(job, 2)
    for name in PLACEMENTS.names():
        load_policy(f"least-outstanding+{name}", RuntimeConfig())


def compile_live() -> None:
    """What the emulated engine and the router run."""
    from servegym.serve.engine.core import rehearse
    from servegym.serve.engine.roles import rehearse_roles

    rehearse(load_scenario("mixed-chat").spec.types[0])
    apart = load_scenario("pd-equal").spec
    rehearse_roles(apart.types[0], apart.transfers)
    compile_router()


def play_environments(name: str, **settings: Any) -> None:
    """Play an episode of an environment, then a few steps of its vector forms."""
    assert servegym.__version__  # importing servegym registers the environments
    env = gymnasium.make(name, **settings)
    _, info = env.reset(seed=0)
    over = False
    while not over:
        _, _, terminated, truncated, info = env.step(int(np.argmax(info["action_mask"])))
        over = terminated or truncated
    env.close()
    several = gymnasium.make_vec(name, num_envs=2, **settings)
    _, info = several.reset(seed=0)
    for _ in range(4):
        *_, info = several.step(info["action_mask"].argmax(-1))
    several.close()


PARTS: dict[Part, Callable[[], None]] = {
    "dispatch": compile_dispatch,
    "migration": compile_migration,
    "tiers": compile_tiers,
    "orders": compile_orders,
    "jobs": compile_jobs,
    "schedules": compile_schedules,
    "bounds": compile_bounds,
    "router": compile_router,
    "live": compile_live,
}


#: Parts that need no kernel of `dispatch`; the others begin when that is compiled.
APART: tuple[Part, ...] = ("jobs", "schedules")


@dataclass(frozen=True)
class Compiled:
    """What compiling a part took."""

    part: Part
    kernels: int
    seconds: float


def compile_part(part: Part) -> Compiled:
    """Compile a part, or load of it what is on disk."""
    begin_s, counter = time.monotonic(), CompileCounter()
    with install_listener("numba:compile", counter):
        PARTS[part]()
    return Compiled(part, counter.kernels, time.monotonic() - begin_s)


def compile_parts(parts: Sequence[Part], pool: Executor) -> Iterator[Compiled]:
    """Compile parts side by side, and tell of each when it is done.

    Kernels of `dispatch` are called by most others, and those of `router` are what `live` has most
    of: what calls them waits, lest it compile them, too.

    Args:
        parts: Which; none twice.
        pool: Compiles. Numba compiles one kernel at a time in a process: so, processes.
    """
    awaited = {part: _awaited(part, parts) for part in parts}
    running = {pool.submit(compile_part, part) for part in parts if awaited[part] is None}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for compiled in (future.result() for future in done):
            later = (part for part in parts if awaited[part] == compiled.part)
            running |= {pool.submit(compile_part, part) for part in later}
            yield compiled


def _awaited(part: Part, parts: Sequence[Part]) -> Part | None:
    """Return that of the parts which must be compiled before one, if any must."""
    if part == "live" and "router" in parts:
        return "router"
    if part not in ("dispatch", *APART) and "dispatch" in parts:
        return "dispatch"
    return None


def side_by_side(parts: Sequence[Part], jobs: int) -> Iterator[Compiled]:
    """Compile parts in several processes."""
    with ProcessPoolExecutor(jobs, get_context("spawn"), _be_quiet) as pool:
        try:
            yield from compile_parts(parts, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def _be_quiet() -> None:
    """Leave it to the parent to say what is compiled."""
    logging.getLogger("servegym.compile").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Compile:
    """Compile all kernels now, and keep them on disk: for images of containers, and before demos.

    What is on disk already is only loaded. NUMBA_CACHE_DIR says where; by default beside the
    package, in `__pycache__`.
    """

    parts: tuple[Part, ...] = tuple(PARTS)
    """Which: dispatch (with the rules, environments and planners), migration (of requests between
    replicas), tiers (of KV), orders, jobs, schedules, bounds (clairvoyant searches), router, live
    (router and emulated engine). Migration, tiers and live need `dispatch` too."""
    jobs: int | None = None
    """How many parts are compiled at the same time, each by a process of its own; by default
    one for each processor, 4 at most."""

    def run(self) -> None:
        """Compile and say what was done."""
        console = make_console()
        kept = places(Path(jit.__file__).absolute())[1]
        if kept is None:
            raise ConfigError(
                "no folder for compiled kernels can be written: set NUMBA_CACHE_DIR to one that can"
            )
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"--jobs must be at least 1, got {self.jobs}")
        parts = tuple(dict.fromkeys(self.parts))
        jobs = self.jobs or min(4, os.cpu_count() or 1)
        table = Table("part", "kernels compiled", "seconds")
        begin_s = time.monotonic()
        alone = jobs == 1 or len(parts) == 1
        done = map(compile_part, parts) if alone else side_by_side(parts, jobs)
        for number, compiled in enumerate(done, 1):
            seconds = f"{compiled.seconds:.1f}"
            table.add_row(compiled.part, str(compiled.kernels), seconds)
            console.print(
                f"{number} of {len(parts)}: {compiled.part},"
                f" {compiled.kernels} kernels, {seconds} s"
            )
        console.print(table)
        console.print(
            f"{time.monotonic() - begin_s:.0f} s, kept in {kept}"
            + (" and its neighbours" if kept.name == "__pycache__" else "")
        )
