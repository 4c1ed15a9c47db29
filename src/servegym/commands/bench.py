"""`servegym bench`."""

from __future__ import annotations

import json as jsonlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from rich.table import Table

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.commands.console import make_console, require_writable
from servegym.policy.run import run
from servegym.scenario import Scenario, load_scenario
from servegym.whole_files import write_whole

_START = (
    "import servegym, gymnasium; gymnasium.make('servegym/Dispatch-v0', num_requests=8).reset()"
)


@dataclass(frozen=True)
class Bench:
    """Measure the speeds the design promises; medians with their spread."""

    json: Path | None = None
    """Write the measurements here."""
    repetitions: int = 5
    """Of every measurement but the start-ups."""
    seconds: float = 2.0
    """Length of one environment measurement."""
    cold: bool = True
    """Also measure a first start, which compiles everything (a minute or two)."""

    def run(self) -> None:
        """Measure and print."""
        require_writable(self.json)
        console = make_console()
        result: dict[str, Any] = {"requests_per_s": {}, "engine_steps_per_s": {}}
        for replicas in (1, 8, 64, 512):
            console.print(f"simulator, {replicas} replicas")
            rates = [self._simulate(replicas) for _ in range(self.repetitions + 1)][1:]
            result["requests_per_s"][str(replicas)] = spread([a for a, _ in rates])
            result["engine_steps_per_s"][str(replicas)] = spread([b for _, b in rates])
        console.print("constant-size decision (power of two)")
        grown = [[self._simulate(n, "power-of-two")[0] for _ in range(3)][-1] for n in (8, 512)]
        result["cost_growth_8_to_512"] = grown[0] / grown[1]
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
                result["cold_start_s"] = spread([start_s(cache)])
                result["warm_start_s"] = spread([start_s(cache) for _ in range(3)])
        table = Table("what", "median", "least", "most", "repetitions")
        for key, value in _flat(result):
            if isinstance(value, dict):
                cells = (f"{value[k]:,.4g}" for k in ("median", "min", "max"))
                table.add_row(key, *cells, str(value["repetitions"]))
            else:
                table.add_row(key, f"{value:.3g}", "", "", "")
        console.print(table)
        if self.json:
            write_whole({self.json: (jsonlib.dumps(result, indent=1) + "\n").encode()})

    def _simulate(self, replicas: int, name: str = "least-outstanding") -> tuple[float, float]:
        scenario = _fleet(replicas)
        episode = scenario.episode(0, load=replicas / 16, num_requests=100_000)
        simulator = Simulator(scenario.spec, [episode])
        begin = time.perf_counter()
        run(simulator, policy(name))
        took = time.perf_counter() - begin
        return len(episode.table) / took, float(simulator.state.env[0]["engine_steps"]) / took

    def _decisions(self, scenario: str, num_envs: int) -> float:
        env = gymnasium.make_vec("servegym/Dispatch-v0", num_envs=num_envs, scenario=scenario)
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
        from servegym.train.ppo import PPOConfig, Trainer

        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(PPOConfig(total_decisions=6 * 32 * 256), Path(folder))
            trainer.run(progress=False)
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
    """Summarise repetitions."""
    return {
        "median": float(np.median(values)),
        "min": min(values),
        "max": max(values),
        "repetitions": len(values),
    }


def _flat(result: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Callable[..., Any] | Any]] = []
    for key, value in result.items():
        if isinstance(value, dict) and "median" not in value:
            rows += [(f"{key} @ {k}", v) for k, v in value.items()]
        else:
            rows.append((key, value))
    return rows
