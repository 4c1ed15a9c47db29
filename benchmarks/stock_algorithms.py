"""Stock algorithms with stock settings on a dispatch environment, judged by the harness.

`python benchmarks/stock_algorithms.py`: MaskablePPO and A2C of Stable-Baselines3 with their default
settings learn for five minutes each, or on so many `--decisions`, on `servegym/DispatchShaped-v1`.
Then they play held-out episodes beside `random`, `least-outstanding` and `added-delay`: once the
most probable action each time, once one drawn. Ratios are to least outstanding, over paired seeds.
With `--id servegym/Dispatch-v1` it shows what the shaped rewards and the other observation are
worth; with `--settings examples/rl-zoo3/ppo.yml` MaskablePPO has the settings there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

from servegym.agents.sb3_policy import StockPolicy
from servegym.baselines.registry import policy
from servegym.envs.sb3 import make_vec
from servegym.evaluate.harness import evaluate
from servegym.scenario import load_scenario

#: Algorithms, and how many environments each learns on unless told otherwise.
ALGORITHMS = {"MaskablePPO": (MaskablePPO, 4), "A2C": (A2C, 8), "PPO": (PPO, 4)}


class TimeLimit(BaseCallback):
    """Stops after so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def _on_training_start(self) -> None:
        self._begin_s = time.perf_counter()

    def _on_step(self) -> bool:
        return time.perf_counter() - self._begin_s < self._seconds


def learn(name: str, arguments: argparse.Namespace) -> list[StockPolicy]:
    """Train one algorithm; unless there are `--settings` only its seed and device are set."""
    kinder = {} if "Shaped" in arguments.id else {"flat": True}
    algorithm: Any
    algorithm, num_envs = ALGORITHMS[name]
    settings: dict[str, Any] = {"policy": "MlpPolicy"}
    if arguments.settings is not None:
        settings = yaml.safe_load(arguments.settings.read_text())[arguments.id]
        del settings["n_timesteps"]
        num_envs = settings.pop("n_envs")
    envs = make_vec(
        arguments.id,
        arguments.num_envs or num_envs,
        scenario=arguments.scenario,
        load=arguments.load,
        num_requests=arguments.learn_requests,
        **kinder,
    )
    envs.reset()  # compiles, which is no part of learning
    model = algorithm(env=envs, seed=arguments.seed, device="cpu", **settings)
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    model.learn(arguments.decisions or 10**9, TimeLimit(60 * arguments.minutes))
    took_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    print(
        f"{name}: {model.num_timesteps:,} decisions in {took_s:.0f} s ({cpu_s:.0f} s of CPU time:"
        f" {model.num_timesteps / cpu_s:,.0f} a second of it)",
        flush=True,
    )
    masked = name == "MaskablePPO"
    batch = envs.get_attr("batch")[0]
    return [
        StockPolicy(model, batch, name, masked=masked, deterministic=True),
        StockPolicy(model, batch, f"{name}, drawn", masked=masked, deterministic=False),
    ]


def main() -> None:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--id", default="servegym/DispatchShaped-v1")
    parser.add_argument("--algorithms", nargs="+", default=["MaskablePPO", "A2C"])
    parser.add_argument("--scenario", default="mixed-chat")
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--num-envs", type=int, help="for each algorithm, else 4, and 8 for A2C")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each algorithm")
    parser.add_argument("--decisions", type=int, help="stop after so many, if that is earlier")
    parser.add_argument("--settings", type=Path, help="in rl-zoo3's form, of the id")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn-requests", type=int, default=1024, help="of an episode")
    parser.add_argument(
        "--num-requests", type=int, nargs="+", default=[512, 1024], help="of an episode when judged"
    )
    parser.add_argument("--num-seeds", type=int, default=10, help="held-out episodes of each")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    learned = [one for name in arguments.algorithms for one in learn(name, arguments)]
    rules = [policy(name) for name in ("random", "least-outstanding", "added-delay")]
    for num_requests in arguments.num_requests:
        result = evaluate(
            load_scenario(arguments.scenario),
            [*rules, *learned],
            loads=[arguments.load],
            num_seeds=arguments.num_seeds,
            num_units=num_requests,
        )
        print(f"\n{num_requests} requests\n| policy | {result.objective.label} | ratio |")
        print("|---|---|---|")
        for name, _ in result.ranking(arguments.load):
            value = result.mean(name, arguments.load, result.objective.metric)
            ratio = result.ratio(name, "least-outstanding", arguments.load)
            print(
                f"| {name} | {value:.2f} | {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] |",
                flush=True,
            )


if __name__ == "__main__":
    main()
