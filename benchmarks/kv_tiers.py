"""Whether it pays to keep KV behind the GPUs, in how much memory, at which load.

The same requests on the same fleet without tiers (0) and with host memory of each size on every
replica; against 0, mean TTFT and mean E2E latency as paired ratios with 95 % intervals over the
seeds, and what was loaded.

python benchmarks/kv_tiers.py --loads 0.6 1.0 --gib 16 64 400
python benchmarks/kv_tiers.py --trace weka_agentic_sessions.parquet --rate 0.4
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from servegym.baselines.registry import policy
from servegym.cluster.outcome import SOURCE_COLUMNS, latencies
from servegym.cluster.simulator import Simulator
from servegym.evaluate.compare import paired_ratio, with_interval
from servegym.evaluate.harness import FIRST_SEED
from servegym.policy.run import run
from servegym.scenario import Scenario, load_scenario
from servegym.scenario.fleet import KvTierConfig, KvTiersConfig
from servegym.workloads.config import TraceConfig


def make_scenario(options: argparse.Namespace, gib: float) -> Scenario:
    """Load the scenario, with so much host memory for KV on every replica."""
    scenario = load_scenario(options.scenario)
    host = KvTierConfig(gib=gib, gb_per_s=options.gb_per_s) if gib else None
    types = scenario.spec.types
    fleet = tuple(
        entry.model_copy(
            update={"host_kv": host, "num_blocks": int(kind.num_blocks * options.kv_share)}
        )
        for entry, kind in zip(scenario.fleet, types, strict=True)
    )
    rules = KvTiersConfig(load=options.load_rule, interference=options.interference)
    update = {"fleet": fleet, "kv_tiers": rules if gib else KvTiersConfig(), "kv_store": None}
    if options.trace:
        update["workload"] = TraceConfig(
            kind="trace", path=str(options.trace), rate_rps=options.rate, too_long="cut"
        )
    return scenario.model_copy(update={**update, "num_requests": options.requests})


def play(scenario: Scenario, rule: str, load: float, num_seeds: int) -> dict[str, np.ndarray]:
    """Return means of each seed: TTFT, TPOT and E2E seconds, and shares of the prompt tokens."""
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        simulator = Simulator(scenario.spec, [scenario.episode(seed, load=load)])
        run(simulator, policy(rule), seed)
        outcomes = simulator.outcomes()
        ttft, tpot, e2e = latencies(outcomes)
        prompts = outcomes["prompt_tokens"].sum()
        loaded = sum(int(outcomes[column].sum()) for column in SOURCE_COLUMNS)
        cached = outcomes["cached_tokens"].sum()
        rows.append((ttft.mean(), np.nanmean(tpot), e2e.mean(), cached / prompts, loaded / prompts))
    names = ("ttft", "tpot", "e2e", "cached", "loaded")
    return dict(zip(names, np.array(rows).T, strict=True))


def main() -> None:
    """Print a row a load and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="agent-sessions")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--policy", default="prefix-load")
    parser.add_argument("--kv-share", type=float, default=1.0)
    parser.add_argument("--gb-per-s", type=float, default=20.0)
    parser.add_argument("--load-rule", default="always")
    parser.add_argument("--interference", type=float, default=2.8)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--gib", type=float, nargs="+", default=[16, 64, 400])
    parser.add_argument("--requests", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    print("| load | GiB | TTFT, s | / without | TPOT | E2E | cached | loaded |")
    print("|--:|--:|--:|---|---|---|--:|--:|")
    for load in options.loads:
        for gib in (0.0, *options.gib):
            found = play(make_scenario(options, gib), options.policy, load, options.seeds)
            if gib == 0:
                without = found
            ratios = [
                with_interval(paired_ratio(found[name], without[name])) if gib else "1"
                for name in ("ttft", "tpot", "e2e")
            ]
            print(
                f"| {load:g} | {gib:g} | {found['ttft'].mean():.2f} | {' | '.join(ratios)} "
                f"| {found['cached'].mean():.1%} | {found['loaded'].mean():.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
