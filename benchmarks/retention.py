"""Whether it pays to keep the KV blocks of ended turns for the next ones, and for how long.

The same requests with each time to live, and without (0), on a scenario whose replicas have a share
of their KV blocks; and under rules that decide turn by turn. Against 0: mean E2E latency as a
paired ratio, the prefix hit rate as a paired difference, each with its 95 % interval over the
seeds.

python benchmarks/retention.py --scenario agent-sessions --kv-share 0.5
python benchmarks/retention.py --kv-share 0.4 --times --rules ttl lognormal by-tool belady
"""

from __future__ import annotations

import argparse

import numpy as np

from servegym.cluster.outcome import latencies
from servegym.cluster.simulator import Simulator
from servegym.evaluate.compare import paired_difference, paired_ratio, with_interval
from servegym.evaluate.harness import FIRST_SEED
from servegym.export.resolve import resolve_dispatch
from servegym.policy.retention import Kept
from servegym.policy.run import run
from servegym.policy.run_kept import make_simulator, run_kept
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
    scenario: Scenario, rule: str, load: float, num_seeds: int, num_requests: int | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return mean E2E and TTFT, seconds, and the prefix hit rate of each seed."""
    e2e_s, ttft_s, hits = [], [], []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        policy = resolve_dispatch(rule)
        episodes = [scenario.episode(seed, load=load, num_requests=num_requests)]
        if isinstance(policy, Kept):
            simulator = make_simulator(scenario.spec, episodes)
            run_kept(simulator, policy, seed)
        else:
            simulator = Simulator(scenario.spec, episodes)
            run(simulator, policy, seed)
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
    parser.add_argument("--requests", type=int)
    parser.add_argument("--times", type=float, nargs="*", default=[2, 10, 30, 600])
    parser.add_argument("--rules", nargs="*", default=[])
    options = parser.parse_args()
    print("| retain_kv_s | mean E2E, s | / without | mean TTFT, s | hit rate | - without, points |")
    print("|--:|--:|--:|--:|--:|--:|")
    rows = [(f"{retain_kv_s:g}", retain_kv_s, "") for retain_kv_s in (0.0, *options.times)]
    rows += [(rule, 0.0, f"+{rule}") for rule in options.rules]
    for name, retain_kv_s, rule in rows:
        scenario = make_scenario(options.scenario, options.kv_share, retain_kv_s)
        policy = f"{options.policy}{rule}"
        found = play(scenario, policy, options.load, options.seeds, options.requests)
        e2e_s, ttft_s, hits = found
        if name == "0":
            without = found
        ratio = with_interval(paired_ratio(e2e_s, without[0]))
        gap = with_interval(paired_difference(hits, without[2]), ".2f", 100.0)
        print(
            f"| {name} | {e2e_s.mean():.2f} | {ratio if name != '0' else '1'} "
            f"| {ttft_s.mean():.2f} | {hits.mean():.1%} | {gap if name != '0' else '0'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
