"""The command `servegym bench`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from rich.table import Table

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.commands.bench_changes import changes, flatten, read_result, write_result
from servegym.commands.console import make_console, require_writable
from servegym.policy.run import run
from servegym.scenario import Scenario, load_scenario

_START = (
    "import servegym, gymnasium; gymnasium.make('servegym/Dispatch-v1', num_requests=8).reset()"
)


@dataclass(frozen=True)
class Bench:
    """Measure the speeds the design promises; medians with their spread."""

    json: Path | None = None
    """Write the measurements here."""
    against: Path | None = None
    """Compare with this file, written by `--json`: what changed by more than the spreads."""
    repetitions: int = 5
    """Of every measurement but the start-ups."""
    seconds: float = 2.0
    """Length of one environment measurement."""
    cold: bool = True
    """Also measure a first start, which compiles everything (a minute or two)."""

    def run(self) -> None:
        """Measure, print and write the speeds."""
        require_writable(self.json)
        before = read_result(self.against) if self.against else None
        console = make_console()
        result: dict[str, Any] = {"requests_per_s": {}, "engine_steps_per_s": {}}
        for replicas in (1, 8, 64, 512):
            console.print(f"simulator, {replicas} replicas")
            rates = [self._simulate(replicas) for _ in range(self.repetitions + 1)][1:]
            result["requests_per_s"][str(replicas)] = spread([a for a, _ in rates])
            result["engine_steps_per_s"][str(replicas)] = spread([b for _, b in rates])
        console.print("constant-size decision (power of two)")
        growth = [self._growth() for _ in range(self.repetitions + 1)][1:]
        result["cost_growth_8_to_512"] = spread(growth)
        for name, envs in (("bench", 256), ("mixed-chat", 64)):
            console.print(f"environment {name}, {envs} environments")
            result[f"env_decisions_per_s_{name}"] = spread(
                [self._decisions(name, envs) for _ in range(self.repetitions)]
            )
        result["env_decisions_per_s"] = result["env_decisions_per_s_bench"]
        console.print("PPO on mixed-chat")
        result["ppo_decisions_per_s"] = spread([self._ppo() for _ in range(2)])
        console.print("start-up")
        if self.cold:
            with tempfile.TemporaryDirectory() as cache:
                result["cold_start_s"] = spread([start_s(cache)])  # minutes: once
                result["warm_start_s"] = spread([start_s(cache) for _ in range(3)])
        table = Table("what", "median", "least", "most", "repetitions")
        for key, value in flatten(result).items():
            cells = (f"{value[k]:,.4g}" for k in ("median", "min", "max"))
            table.add_row(key, *cells, str(value["repetitions"]))
        console.print(table)
        if before is not None:
            table = Table("what", "before", "after", "ratio", "change")
            for change in changes(before, result):
                ratio = change.after / change.before
                medians = (f"{m:,.4g}" for m in (change.before, change.after))
                table.add_row(change.name, *medians, f"{ratio:.3f}", change.verdict)
            console.print(table)
        if self.json:
            write_result(self.json, result)

    def _growth(self) -> float:
        """Cost per request with 512 replicas over that with 8, one measured after the other."""
        few, many = (self._simulate(n, "power-of-two")[0] for n in (8, 512))
        return few / many

    def _simulate(self, replicas: int, name: str = "least-outstanding") -> tuple[float, float]:
        scenario = _fleet(replicas)
        episode = scenario.episode(0, load=replicas / 16, num_requests=100_000)
        simulator = Simulator(scenario.spec, [episode])
        begin = time.perf_counter()
        run(simulator, policy(name))
        took = time.perf_counter() - begin
        return len(episode.table) / took, float(simulator.state.env[0]["engine_steps"]) / took

    def _decisions(self, scenario: str, num_envs: int) -> float:
        env = gymnasium.make_vec("servegym/Dispatch-v1", num_envs=num_envs, scenario=scenario)
        observation, _ = env.reset(seed=0)
        count, took, begin = 0, 0.0, time.perf_counter()
        while time.perf_counter() - begin < self.seconds:
            load = observation["replicas"][..., 1] / np.maximum(
                observation["replicas"][..., 8], 1e-9
            )
            chosen = (load[:, : observation["action_mask"].shape[1]]).argmin(-1)
            start = time.perf_counter()
            observation, *_ = env.step(chosen)
            took += time.perf_counter() - start
            count += num_envs
        env.close()
        return count / took

    def _ppo(self) -> float:
        from servegym.commands.train import require_torch

        require_torch()
        from servegym.train.ppo import Trainer
        from servegym.train.ppo_settings import PPOConfig

        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(PPOConfig(total_decisions=6 * 32 * 256), Path(folder))
            trainer.run()
            return trainer.history[-1]["time/fps"]


def _fleet(replicas: int) -> Scenario:
    bench = load_scenario("bench")
    entry = bench.fleet[0].model_copy(update={"count": replicas})
    return bench.model_copy(update={"fleet": (entry,)})


def start_s(cache: str) -> float:
    """Time a new process to its first observation, with compiled code kept in `cache`."""
    begin = time.perf_counter()
    environment = dict(os.environ, NUMBA_CACHE_DIR=cache)
    subprocess.run([sys.executable, "-c", _START], check=True, env=environment)
    return time.perf_counter() - begin


def spread(values: list[float]) -> dict[str, float]:
    """Summarise the repetitions of one measurement."""
    return {
        "median": float(np.median(values)),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
    }
