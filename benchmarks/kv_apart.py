"""Where agents' next turns find their KV when prefill and decode are apart.

The coding agents of `agent-sessions` on GPUs of which a half prefill and the others decode: what
was decoded lies on other GPUs than those where the next turn is prefilled. The same requests with
KV on the GPUs alone; with host memory on every replica; with a store of all; with prefixes fetched
from other replicas; and with both. Against the first row, mean TTFT, TPOT and E2E latency as paired
ratios with 95 % intervals over the seeds; and which share of the prompt tokens was not computed,
came from hosts, from the store, and from other replicas.

Run with:
    python benchmarks/kv_apart.py [--loads 0.6 1.0] [--seeds 8]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from servegym.evaluate.compare import paired_ratio, with_interval
from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario, load_scenario

HOST = {"gib": 64, "gb_per_s": 32.0}
STORE = {"gib": 2000, "gb_per_s": 80.0, "link_gb_per_s": 10.0, "latency_s": 0.002}
#: What is behind the GPUs: fields of a fleet entry, of the scenario, and of its `kv_tiers`.
BEHIND: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}, {}),
    "hosts": ({"host_kv": HOST}, {}, {}),
    "a store": ({}, {"kv_store": STORE}, {}),
    "peers": ({}, {}, {"balancing_threshold": 1.0}),
    "a store and peers": ({}, {"kv_store": STORE}, {"balancing_threshold": 1.0}),
}
LATENCIES = ("ttft_mean_s", "tpot_mean_s", "e2e_mean_s")
SHARES = ("prefix_hit_rate", "loaded_from_host", "loaded_from_store", "loaded_from_peer")


def make_scenario(options: argparse.Namespace, behind: str) -> Scenario:
    """Make the fleet, with something behind its GPUs."""
    entry_fields, fields, rules = BEHIND[behind]
    if entry_fields or fields:
        rules = {"interference": options.interference, **rules}
    entry = {"gpu": options.gpu, "count": options.count, "link": {"gb_per_s": options.gb_per_s}}
    roles = ("prefill", "decode")
    workload = load_scenario("agent-sessions").workload.model_dump()
    return Scenario.model_validate(
        {
            "name": "agents apart",
            "engine": {"block_size": 64, "max_num_seqs": 128},
            "fleet": [{**entry, **entry_fields, "role": role} for role in roles],
            "kv_tiers": {"load": "faster", **rules} if rules else {},
            "workload": {**workload, "rate_rps": options.rate},
            "slo_classes": [{"name": "agent", "ttft_s": 5.0, "tpot_s": 0.05}],
            "num_requests": options.requests,
            **fields,
        }
    )


def main() -> None:
    """Print a row for each load and for all that can be behind the GPUs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="A100-SXM-80GB")
    parser.add_argument("--count", type=int, default=4, help="of either role")
    parser.add_argument("--gb-per-s", type=float, default=20.0, help="of every GPU's link")
    parser.add_argument("--rate", type=float, default=1.5, help="sessions a second at load 1")
    parser.add_argument("--interference", type=float, default=2.8)
    parser.add_argument("--behind", nargs="+", default=list(BEHIND), choices=BEHIND)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--policy", default="prefix-load+least-tpot")
    parser.add_argument("--requests", type=int, default=768)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    problem = Dispatch()
    policy = problem.resolve(options.policy)
    print("| load | behind the GPUs | TTFT, s | / first | TPOT | E2E | cached | ", end="")
    print("hosts | store | peers |\n|--:|---|--:|---|---|---|--:|--:|--:|--:|")
    for load in options.loads:
        first: dict[str, np.ndarray] = {}
        for behind in options.behind:
            scenario = make_scenario(options, behind)
            metrics = problem.episodes(scenario, range(options.seeds), load=load)
            played = metrics.play(policy).metrics
            found = {
                name: np.array([m.get(name, 0.0) for m in played]) for name in LATENCIES + SHARES
            }
            first = first or found
            ratios = [
                "1" if found is first else with_interval(paired_ratio(found[name], first[name]))
                for name in LATENCIES
            ]
            shares = [f"{found[name].mean():.1%}" for name in SHARES]
            cells = (f"{found['ttft_mean_s'].mean():.2f}", *ratios, *shares)
            print(f"| {load:g} | {behind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
