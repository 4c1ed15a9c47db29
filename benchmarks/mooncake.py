"""Mean TTFT on Mooncake's conversation trace, from random to cache-aware prefill scheduling.

Sixteen nodes of eight A100 with a 70-billion-parameter model, a half of them prefill and the others
decode. The published means (FAST'25, 16 nodes of 8 A800) are 19.7 s at random, 5.3 s balanced by
load, 3.6 s with local caches in mind, and 3.1 s where a prefix is fetched from the cache of another
node if it is longer there by a threshold, which is not published.

Run with:
    python benchmarks/mooncake.py mooncake_conversation_firsthalf.parquet [--loads 1 1.25]
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from servegym.evaluate.compare import paired_ratio, with_interval
from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario

GPU = {"gpu": "A100-SXM-80GB", "tp": 8, "count": 8, "link": {"gb_per_s": 87.0, "latency_s": 0.001}}
#: Who prefills; and whether replicas fetch prefixes from each other. The first four are Mooncake's;
#: the last two say what of the fourth is due to the fetching alone.
POLICIES = {
    "random": ("random", False),
    "balanced by load": ("token-least-load", False),
    "local caches": ("conductor", False),
    "all caches": ("conductor:threshold={threshold:g}", True),
    "balanced by load, fetching": ("token-least-load", True),
    "local caches, fetching": ("conductor", True),
}
AGAINST = "local caches"
METRICS = ("ttft_mean_s", "ttft_p99_s", "prefix_hit_rate", "loaded_from_peer")


def scenario(trace: str, num_requests: int, threshold: float | None = None) -> Scenario:
    """Make the fleet, and let it play a trace as fast as it was recorded.

    Args:
        trace: A file.
        num_requests: Of an episode.
        threshold: Prefixes so many times as long elsewhere are fetched; None: none is.
    """
    fleet: list[dict[str, Any]] = [{**GPU, "role": role} for role in ("prefill", "decode")]
    return Scenario.model_validate(
        {
            "name": "mooncake",
            "model": "Llama-3.1-70B",
            "engine": {"block_size": 512, "max_num_batched_tokens": 8192},
            "fleet": fleet,
            "kv_tiers": {"balancing_threshold": threshold},
            "workload": {"kind": "trace", "path": trace, "too_long": "skip"},
            "slo_classes": [{"name": "all", "ttft_s": 30.0, "tpot_s": 0.2}],
            "num_requests": num_requests,
        }
    )


def main() -> None:
    """Print a row for each load and policy: means over the windows, ratios with 95 % intervals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0, 1.25])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=3000, help="of an episode")
    parser.add_argument("--threshold", type=float, default=1.0, help="of fetching prefixes")
    given = parser.parse_args()
    print(f"| load | prefill by | TTFT mean s | / {AGAINST} | p99 s | cached | fetched |")
    print("|--:|---|--:|---|--:|--:|--:|")
    problem, plain = Dispatch(), scenario(given.trace, given.requests)
    fetching = scenario(given.trace, given.requests, given.threshold)
    for load in given.loads:
        found = {}
        for name, (rule, fetches) in POLICIES.items():
            episodes = problem.episodes(
                fetching if fetches else plain, range(given.seeds), load=load
            )
            policy = problem.resolve(rule.format(threshold=given.threshold) + "+least-tpot")
            metrics = episodes.play(policy).metrics
            found[name] = np.array([[m.get(key, 0.0) for key in METRICS] for m in metrics]).T
        for name, (ttft_s, p99_s, hits, fetched) in found.items():
            ratio = with_interval(paired_ratio(ttft_s, found[AGAINST][0]))
            cells = (f"{ttft_s.mean():.2f}", "1" if name == AGAINST else ratio)
            cells += (f"{p99_s.mean():.1f}", f"{hits.mean():.0%}", f"{fetched.mean():.0%}")
            print(f"| {load:g} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
