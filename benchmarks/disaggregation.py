"""Where it pays to prefill and decode on different GPUs: DistServe's goodput, with and without.

The highest rate at which nine of ten requests are within both limits, per GPU, of one fleet whose
replicas do all of a request (`added-delay`) and of the same GPUs split in two, the best of all
splits (`token-least-load+least-tpot`); and the split that DistServe's placement finds without
playing any of them, from one instance of each phase alone.

Run with:
    python benchmarks/disaggregation.py [--seeds 4] [--requests 600] [--traces FILE ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from servegym.evaluate.placement import distserve_placement
from servegym.problems.dispatch import Dispatch, DispatchEpisodes
from servegym.scenario import Scenario

GPU, LINK = "A100-SXM-80GB", {"gb_per_s": 40.0, "latency_s": 0.001}
ATTAINED, TTFT_S = 0.9, 1.0


def generated(prompt_tokens: float) -> dict[str, Any]:
    """Make a workload of prompts of a median length."""
    return {
        "kind": "generated",
        "prompt": {"medians_tokens": [prompt_tokens], "sigmas": [0.6], "max_tokens": 16000},
        "output": {"medians_tokens": [150.0], "sigmas": [0.7], "max_tokens": 1500},
    }


def scenario(
    fleet: list[dict[str, Any]], workload: dict[str, Any], tpot_s: float, rate_rps: float = 1.0
) -> Scenario:
    """Make a scenario."""
    return Scenario.model_validate(
        {
            "name": "disaggregation",
            "engine": {"prefix_caching": False},
            "fleet": fleet,
            "workload": {**workload, "rate_rps": rate_rps},
            "slo_classes": [{"name": "all", "ttft_s": TTFT_S, "tpot_s": tpot_s}],
        }
    )


def split(num_gpus: int, num_prefill: int) -> list[dict[str, Any]]:
    """Let so many GPUs prefill and the others decode; 0: let each do all."""
    if num_prefill == 0:
        return [{"gpu": GPU, "count": num_gpus}]
    counts = {"prefill": num_prefill, "decode": num_gpus - num_prefill}
    return [{"gpu": GPU, "count": n, "role": role, "link": LINK} for role, n in counts.items()]


def highest_rate(
    played: Scenario, policy: str, most_rps: float, seeds: int, requests: int
) -> float:
    """Search the highest rate at which enough requests are within their limits."""
    problem = Dispatch()
    low, high = 0.0, most_rps
    while high - low > 0.02 * high:
        rate = (low + high) / 2
        episodes = problem.episodes(played, range(seeds), load=rate, num_units=requests)
        assert isinstance(episodes, DispatchEpisodes)
        metrics = episodes.play(problem.resolve(policy)).metrics
        attained = sum(m["slo_attainment"] for m in metrics) / seeds
        low, high = (rate, high) if attained >= ATTAINED else (low, rate)
    return low


def row(
    num_gpus: int, name: str, workload: dict[str, Any], tpot_s: float, seeds: int, requests: int
) -> str:
    """Compare the fleet that does all with the best split of it."""

    def rate(num_prefill: int, policy: str) -> float:
        made = scenario(split(num_gpus, num_prefill), workload, tpot_s)
        return highest_rate(made, policy, 60.0 * num_gpus, seeds, requests * num_gpus) / num_gpus

    mixed = rate(0, "added-delay")
    rates = {n: rate(n, "token-least-load+least-tpot") for n in range(1, num_gpus)}
    best = max(rates, key=lambda n: rates[n])
    whole = scenario(split(num_gpus, 0), workload, tpot_s, rate_rps=5.0)
    found = distserve_placement(
        whole, num_gpus, attainment=ATTAINED, num_seeds=seeds, num_requests=requests
    )
    planned = found.num_prefill  # all others decode
    cells = (num_gpus, name, f"{1e3 * tpot_s:.0f} ms", f"{mixed:.2f}")
    splits = " | ".join(f"{rates[n]:.2f} | {n}" for n in (best, planned))
    return f"| {' | '.join(map(str, cells))} | {splits} |"


def main() -> None:
    """Print a row for each kind of prompts, limit and number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=600, help="of an episode, per GPU")
    parser.add_argument("--traces", nargs="*", default=[], help="instead, on eight GPUs")
    given = parser.parse_args()
    played = [
        (num_gpus, f"{tokens:.0f}", generated(tokens))
        for num_gpus in (2, 8)
        for tokens in (150.0, 2000.0)
    ]
    if given.traces:
        played = [
            (8, Path(path).name, {"kind": "trace", "path": path, "too_long": "skip"})
            for path in given.traces
        ]
    print(
        "| GPUs | median prompt or trace | TPOT limit | mixed, requests/s per GPU "
        "| split | prefill GPUs | DistServe's split | prefill GPUs |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for num_gpus, name, workload in played:
        for tpot_s in (0.02, 0.1):
            found = row(num_gpus, name, workload, tpot_s, given.seeds, given.requests)
            print(found, flush=True)


if __name__ == "__main__":
    main()
