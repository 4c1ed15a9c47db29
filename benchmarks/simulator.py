"""Requests per second of CPU time that the simulator plays, by what a fleet does with its KV.

`python benchmarks/simulator.py`:
bundled scenarios as they are, and with as many of each replica as make about 64, at so many times
the load, all under least outstanding requests. `bench` has no mechanism but the engines' own.
Median of rounds that alternate between the scenarios, so that whatever else the machine does meets
all of them; drawing and loading an episode is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.policy.run import run
from servegym.scenario import Scenario, load_scenario


def widened(scenario: Scenario, replicas: int) -> tuple[Scenario, float]:
    """Return a scenario with about so many replicas, if it has fewer, and the load for them."""
    times = max(1, replicas // scenario.max_replicas)
    fleet = tuple(
        entry.model_copy(update={"count": entry.count * times}) for entry in scenario.fleet
    )
    return scenario.model_copy(update={"fleet": fleet}), float(times)


def episode(scenario: Scenario, load: float, num_requests: int) -> Callable[[], float]:
    """Make what plays an episode and returns the seconds of CPU time of a request."""
    drawn = scenario.episode(0, load=load, num_requests=num_requests)
    simulator, rule = Simulator(scenario.spec, [drawn]), policy("least-outstanding")

    def one_round() -> float:
        simulator.load(0, drawn)
        begin = time.process_time()
        run(simulator, rule)
        return (time.process_time() - begin) / num_requests

    return one_round


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ["bench", "pd-equal", "pd-unequal", "near-full-kv", "agents-tiers"]
    parser.add_argument("--scenarios", nargs="+", default=names)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--num-requests", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    plays: dict[tuple[str, int], Callable[[], float]] = {}
    for name in args.scenarios:
        for replicas in args.replicas:
            scenario, load = widened(load_scenario(name), replicas)
            plays[name, scenario.max_replicas] = episode(scenario, load, args.num_requests)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in plays}
    for play in plays.values():  # compiles
        play()
    for _ in range(args.rounds):
        for key, play in plays.items():
            taken[key].append(play())
    print("| scenario | replicas | requests/s | lowest, highest |\n|---|--:|--:|---|")
    for (name, replicas), times in taken.items():
        low, middle, high = np.percentile(1.0 / np.array(times), (0, 50, 100))
        print(f"| `{name}` | {replicas} | {middle:,.0f} | {low:,.0f}, {high:,.0f} |")


if __name__ == "__main__":
    main()
