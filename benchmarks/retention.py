"""Whether it pays to keep the KV blocks of ended turns for the next ones, and for how long.

The same requests with each time to live, and without (0), on a scenario whose replicas have a share
of their KV blocks. Against 0: mean E2E latency as a paired ratio, the prefix hit rate as a paired
difference, each with its 95 % interval over the seeds.

python benchmarks/retention.py --scenario agent-sessions --kv-share 0.5
"""

from __future__ import annotations

import argparse

import numpy as np

from servegym.baselines.registry import policy
from servegym.cluster.outcome import latencies
from servegym.cluster.simulator import Simulator
from servegym.evaluate.compare import paired_difference, paired_ratio, with_interval
from servegym.evaluate.harness import FIRST_SEED
from servegym.policy.run import run
from servegym.scenario import Scenario, load_scenario
from servegym.typing import FloatArray


def make_scenario(name: str, kv_share: float, retain_kv_s: float) -> Scenario:
    """Load a scenario, with a share of the KV blocks of each replica and a time to live."""
    scenario, types = load_scenario(name), load_scenario(name).spec.types
    fleet = tuple(
        entry.model_copy(update={"num_blocks": int(kind.num_blocks * kv_share)})
        for entry, kind in zip(scenario.fleet, types, strict=True)
    )
    engine = scenario.engine.model_copy(update={"retain_kv_s": retain_kv_s})
    return scenario.model_copy(update={"fleet": fleet, "engine": engine})


def play(
    scenario: Scenario, rule: str, load: float, num_seeds: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return mean E2E and TTFT, seconds, and the prefix hit rate of each seed."""
    e2e_s, ttft_s, hits = [], [], []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        simulator = Simulator(scenario.spec, [scenario.episode(seed, load=load)])
        run(simulator, policy(rule), seed)
        outcomes = simulator.outcomes()
        ttft, _, e2e = latencies(outcomes)
        e2e_s.append(e2e.mean())
        ttft_s.append(ttft.mean())
        hits.append(outcomes["cached_tokens"].sum() / outcomes["prompt_tokens"].sum())
    return np.array(e2e_s), np.array(ttft_s), np.array(hits)


def main() -> None:
    """Print a row a time to live."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="agent-sessions")
    parser.add_argument("--policy", default="prefix-load")
    parser.add_argument("--kv-share", type=float, default=0.5)
    parser.add_argument("--load", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--times", type=float, nargs="+", default=[2, 10, 30, 120, 600])
    options = parser.parse_args()
    print("| retain_kv_s | mean E2E, s | / without | mean TTFT, s | hit rate | - without, points |")
    print("|--:|--:|--:|--:|--:|--:|")
    for retain_kv_s in (0.0, *options.times):
        scenario = make_scenario(options.scenario, options.kv_share, retain_kv_s)
        found = play(scenario, options.policy, options.load, options.seeds)
        e2e_s, ttft_s, hits = found
        if retain_kv_s == 0:
            without = found
        ratio = with_interval(paired_ratio(e2e_s, without[0]))
        gap = with_interval(paired_difference(hits, without[2]), ".2f", 100.0)
        print(
            f"| {retain_kv_s:g} | {e2e_s.mean():.2f} | {ratio if retain_kv_s else '1'} "
            f"| {ttft_s.mean():.2f} | {hits.mean():.1%} | {gap if retain_kv_s else '0'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
