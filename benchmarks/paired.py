"""This checkout against another: CPU time of the same work, in short slices that alternate.

Two processes, one importing servegym from each checkout, take turns for a few milliseconds each, so
that whatever else the machine does meets both. The ratio of a pair of slices is this checkout's CPU
time over the other's: below 1 this one is faster.

Where a process happens to lie in memory makes a few percent, for as long as it lives. So the
processes are started several times, and the interval is over their medians: pairs of slices within
one start would call that difference certain.

Run with:
    git worktree add ../before REVISION
    python benchmarks/paired.py ../before [--only dispatch-256] [--starts 8] [--pairs 12]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from servegym.typing import FloatArray

#: Id, scenario, environments (0: one, without the vector form) and decisions of a slice; with the
#: name `-episodes` as many as an episode of each has, so that all drawing and ending is in it.
ENVIRONMENTS = {
    "dispatch": ("servegym/Dispatch-v1", "mixed-chat", 0, 5_000),
    "dispatch-1": ("servegym/Dispatch-v1", "mixed-chat", 1, 5_000),
    "dispatch-16": ("servegym/Dispatch-v1", "mixed-chat", 16, 5_000),
    "dispatch-64": ("servegym/Dispatch-v1", "mixed-chat", 64, 5_120),
    "dispatch-64-episodes": ("servegym/Dispatch-v1", "mixed-chat", 64, 131_072),
    "dispatch-256": ("servegym/Dispatch-v1", "mixed-chat", 256, 5_120),
    "dispatch-hetero-64": ("servegym/Dispatch-v1", "hetero-prefix", 64, 5_120),
    "preemption-64": ("servegym/Preemption-v0", "kv-starved", 64, 8_000),
    "workflow-64": ("servegym/Workflow-v0", "text-to-sql", 64, 30_000),
}
#: Scenario, replicas (0: the scenario's) and requests of a slice.
SIMULATOR = {
    "simulator-1": ("bench", 1, 4_000),
    "simulator-8": ("bench", 8, 8_000),
    "simulator-64": ("bench", 64, 16_000),
    "simulator-512": ("bench", 512, 32_000),
    "simulator-mixed-chat": ("mixed-chat", 0, 2_048),
    "simulator-agents-tiers": ("agents-tiers", 0, 512),
}

#: Scenario, and episodes of 2,048 requests that a slice draws and loads.
EPISODES = {
    "episodes-mixed-chat": ("mixed-chat", 16),
    "episodes-hetero-prefix": ("hetero-prefix", 16),
}

#: Tokens of the last prompt of a conversation of four turns, and conversations of a slice.
DISPATCHER = {
    "dispatcher-log-1k": (1_000, 100),
    "dispatcher-log-32k": (32_000, 10),
}

#: An update of PPO on mixed-chat, of 8,192 decisions, or a validation, which every tenth has.
TRAINER = ("ppo-update", "ppo-validation")


def environment(name: str) -> Callable[[], None]:
    """Make a slice of an environment's work: least outstanding, or the first allowed action."""
    import gymnasium

    import servegym  # noqa: F401  (registers the environments)

    kind, scenario, num_envs, decisions = ENVIRONMENTS[name]
    dispatches = "Dispatch" in kind
    settings = {"num_requests": 2048} if dispatches else {}
    if num_envs == 0:
        return _alone(gymnasium.make(kind, scenario=scenario, **settings), decisions)
    env = gymnasium.make_vec(
        kind,
        num_envs=num_envs,
        scenario=scenario,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
        **settings,
    )
    observation, info = env.reset(seed=0)
    seen = {"observation": observation, "mask": info["action_mask"]}

    def work() -> None:
        for _ in range(decisions // num_envs):
            action = seen["mask"].argmax(-1)
            if dispatches:
                busy = np.where(seen["mask"] == 1, seen["observation"]["replicas"][..., 1], np.inf)
                action = busy.argmin(-1)
            seen["observation"], _, _, _, info = env.step(action)
            seen["mask"] = info["action_mask"]

    return work


def _alone(env: Any, decisions: int) -> Callable[[], None]:
    observation, _ = env.reset(seed=0)
    seen = {"observation": observation}

    def work() -> None:
        for _ in range(decisions):
            observation = seen["observation"]
            busy = np.where(observation["action_mask"] == 1, observation["replicas"][:, 1], np.inf)
            seen["observation"], _, over, _, _ = env.step(busy.argmin())
            if over:
                seen["observation"], _ = env.reset()

    return work


def simulator(name: str) -> Callable[[], None]:
    """Make a slice of the simulator's work: one episode under least outstanding requests."""
    from servegym.baselines.registry import policy
    from servegym.cluster.simulator import Simulator
    from servegym.policy.run import run
    from servegym.scenario import load_scenario

    scenario_name, replicas, requests = SIMULATOR[name]
    scenario = load_scenario(scenario_name)
    load = 1.0
    if replicas:
        entry = scenario.fleet[0].model_copy(update={"count": replicas})
        scenario, load = scenario.model_copy(update={"fleet": (entry,)}), replicas / 16
    episode = scenario.episode(0, load=load, num_requests=requests)
    made = Simulator(scenario.spec, [episode])
    rule = policy("least-outstanding")

    def work() -> None:
        made.load(0, episode)
        run(made, rule)

    return work


def episodes(name: str) -> Callable[[], None]:
    """Make a slice of what episodes take before they are played."""
    from servegym.cluster.simulator import Simulator
    from servegym.scenario import load_scenario

    scenario_name, count = EPISODES[name]
    scenario = load_scenario(scenario_name)
    seeds = itertools.count()

    def draw() -> Any:
        return scenario.episode(next(seeds), load=0.8, num_requests=2048)

    made = Simulator(scenario.spec, [draw()])

    def work() -> None:
        for _ in range(count):
            made.load(0, draw())

    return work


def dispatcher(name: str) -> Callable[[], None]:
    """Make a slice of a router's work without its network: requests from arrival to log."""
    from servegym.serve.decision_log import DecisionLogConfig
    from servegym.serve.dispatcher import DispatchConfig, Dispatcher
    from servegym.serve.facts import Rates, fleet_facts
    from servegym.serve.runtime import RuntimeConfig

    tokens, conversations = DISPATCHER[name]
    folder = tempfile.mkdtemp()
    config = DispatchConfig(
        runtime=RuntimeConfig(policy="added-delay"),
        log=DecisionLogConfig(folder=Path(folder), max_file_rows=2_000, max_files=2),
        seed=0,
    )
    rates = [Rates(prefill_tokens_per_s=2e4, decode_step_s=0.01, kv_capacity_tokens=500_000)] * 8
    made = Dispatcher(config, [str(r) for r in range(8)], fleet_facts(rates))
    turn = "and then the whale said to the captain that it had seen the ship. " * (tokens // 66)
    number = itertools.count()

    def work() -> None:
        for _ in range(conversations):
            text = f"conversation {next(number)}, "
            for _ in range(4):
                text += turn
                job = made.arrive(text, key="k", max_tokens=100)
                made.decide(job)
                made.first_token(job)
                made.tokens(job, 100)
                made.finish(job, 100)

    return work


def trainer(name: str) -> Callable[[], None]:
    """Make a slice of a run that trains a dispatcher with the settings that are the default."""
    from servegym.train.ppo import Trainer
    from servegym.train.ppo_settings import PPOConfig

    config = PPOConfig(total_decisions=1 << 40)
    made = Trainer(config, Path(tempfile.mkdtemp()) / "run")
    made.prepare()
    made.updates[0] = config.warmup_updates  # actor and critic learn

    def work() -> None:
        if name == "ppo-update":
            made.improve()
        else:
            made.validate()

    return work


def serve(name: str) -> None:
    """Do a slice of work for every line read, and answer with its CPU time, nanoseconds."""
    makers = (
        (ENVIRONMENTS, environment),
        (SIMULATOR, simulator),
        (EPISODES, episodes),
        (DISPATCHER, dispatcher),
        (TRAINER, trainer),
    )
    work = next(make for names, make in makers if name in names)(name)
    for _ in range(3):
        work()
    print("ready", flush=True)
    for _ in sys.stdin:
        begin = time.process_time_ns()
        work()
        print(time.process_time_ns() - begin, flush=True)


def ratios(name: str, sources: tuple[Path, Path], pairs: int) -> tuple[FloatArray, float]:
    """Start two processes; return this one's CPU time over the other's, and its slices' in ms."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(source)},
        )
        for source in sources
    ]
    try:
        for worker, source in zip(workers, sources, strict=True):
            assert worker.stdout is not None
            if worker.stdout.readline() != "ready\n":
                raise SystemExit(f"{name}: the process that imports {source} failed")
        took = np.zeros((pairs, 2))
        for i in range(pairs):
            for j in (0, 1) if i % 2 else (1, 0):
                stdin, stdout = workers[j].stdin, workers[j].stdout
                assert stdin is not None
                assert stdout is not None
                stdin.write("go\n")
                stdin.flush()
                took[i, j] = int(stdout.readline())
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return took[:, 0] / took[:, 1], float(np.median(took[:, 0]) / 1e6)


def compare(name: str, sources: tuple[Path, Path], starts: int, pairs: int) -> dict[str, float]:
    """Return the median over starts of their median ratio, and its 95 % bootstrap interval."""
    found = [ratios(name, sources, pairs) for _ in range(starts)]
    medians = np.array([np.median(ratio) for ratio, _ in found])
    draws = np.random.default_rng(0).choice(medians, (2000, starts))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {
        "ratio": float(np.median(medians)),
        "low": float(low),
        "high": float(high),
        "slice_ms": float(np.median([ms for _, ms in found])),
        "starts": starts,
        "pairs": pairs,
    }


def main() -> None:
    """Compare all, or some, and print a table."""
    names = [*ENVIRONMENTS, *SIMULATOR, *EPISODES, *DISPATCHER, *TRAINER]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?", type=Path, help="the other checkout")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--starts", type=int, default=8, help="of both processes")
    parser.add_argument("--pairs", type=int, default=12, help="of slices within a start")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    if args.before is None or not (args.before / "src" / "servegym").is_dir():
        parser.error(f"BEFORE must be a checkout with src/servegym, got {args.before}")
    sources = (Path(__file__).resolve().parents[1] / "src", (args.before / "src").resolve())
    found = {}
    print(f"{'work':<22}{'CPU time, this / other':>24}{'95 % interval':>20}{'slice, ms':>11}")
    for name in args.only:
        row = found[name] = compare(name, sources, args.starts, args.pairs)
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]"
        print(f"{name:<22}{row['ratio']:>24.3f}{interval:>20}{row['slice_ms']:>11.1f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
