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

from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario

GPU = {"gpu": "A100-SXM-80GB", "tp": 8, "count": 8, "link": {"gb_per_s": 87.0, "latency_s": 0.001}}
POLICIES = {
    "random": "random+least-tpot",
    "balanced by load": "token-least-load+least-tpot",
    "local caches": "conductor+least-tpot",
    "all caches": "conductor:threshold={threshold:g}+least-tpot",
}


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
    """Print a row for each policy and load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace")
    parser.add_argument("--loads", type=float, nargs="+", default=[1.0, 1.25])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=3000, help="of an episode")
    parser.add_argument("--threshold", type=float, default=1.0, help="of fetching prefixes")
    given = parser.parse_args()
    print("| load | prefill by | TTFT mean s | p99 s | cached % | TPOT mean ms |")
    print("|--:|---|--:|--:|--:|--:|")
    problem, plain = Dispatch(), scenario(given.trace, given.requests)
    fetching = scenario(given.trace, given.requests, given.threshold)
    for load in given.loads:
        for name, text in POLICIES.items():
            played = fetching if name == "all caches" else plain
            episodes = problem.episodes(played, range(given.seeds), load=load)
            policy = problem.resolve(text.format(threshold=given.threshold))
            metrics = episodes.play(policy).metrics
            ttft_s, p99_s, hits, tpot_s = (
                sum(m[key] for m in metrics) / len(metrics)
                for key in ("ttft_mean_s", "ttft_p99_s", "prefix_hit_rate", "tpot_mean_s")
            )
            cells = (f"{ttft_s:.2f}", f"{p99_s:.1f}", f"{100 * hits:.0f}", f"{1e3 * tpot_s:.1f}")
            print(f"| {load:g} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
