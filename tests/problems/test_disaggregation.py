"""Disaggregation pays where DistServe says, and does not where it does not."""

from __future__ import annotations

from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario
from servegym.scenario.fleet import KvTiersConfig

LINK = {"gb_per_s": 40.0, "latency_s": 0.001}
GPU = "A100-SXM-80GB"


def attained(num_gpus: int, num_prefill: int, prompt_tokens: float, rate_rps: float) -> float:
    """Share of requests within 1 s and 20 ms a token; no prefill replicas: each does all."""
    counts = {"prefill": num_prefill, "decode": num_gpus - num_prefill}
    fleet = [{"gpu": GPU, "count": n, "role": role, "link": LINK} for role, n in counts.items()]
    scenario = Scenario.model_validate(
        {
            "name": "split or not",
            "engine": {"prefix_caching": False},
            "fleet": fleet if num_prefill else [{"gpu": GPU, "count": num_gpus}],
            "workload": {
                "kind": "generated",
                "rate_rps": rate_rps,
                "prompt": {"medians_tokens": [prompt_tokens], "sigmas": [0.6]},
                "output": {"medians_tokens": [150.0], "sigmas": [0.7], "max_tokens": 1500},
            },
            "slo_classes": [{"name": "all", "ttft_s": 1.0, "tpot_s": 0.02}],
            "num_requests": 500,
        }
    )
    policy = "token-least-load+least-tpot" if num_prefill else "added-delay"
    [metrics] = Dispatch().episodes(scenario, [0]).play(Dispatch().resolve(policy)).metrics
    return metrics["slo_attainment"]


def test_it_wins_with_long_prompts_under_a_tight_limit_per_token_on_many_gpus():
    assert attained(8, 4, 2000.0, 15.0) > 0.9
    assert attained(8, 0, 2000.0, 15.0) < 0.6


def test_it_loses_with_short_prompts_on_few_gpus():
    assert attained(2, 1, 150.0, 28.0) < 0.6
    assert attained(2, 0, 150.0, 28.0) > 0.9


def test_time_to_the_first_token_falls_from_random_to_prefills_aware_of_all_caches():
    fleet = [{"gpu": GPU, "count": 4, "role": role, "link": LINK} for role in ("prefill", "decode")]
    scenario = Scenario.model_validate(
        {
            "name": "long conversations",
            "engine": {"block_size": 64},
            "fleet": fleet,
            "workload": {
                "kind": "generated",
                "rate_rps": 14.0,
                "prompt": {"medians_tokens": [2000.0], "sigmas": [0.8], "max_tokens": 8000},
                "output": {"medians_tokens": [150.0], "sigmas": [0.7], "max_tokens": 800},
                "sessions": {"mean_turns": 4.0, "think_s": 10.0, "max_context_tokens": 16000},
            },
            "num_requests": 600,
        }
    )
    fetching = scenario.model_copy(update={"kv_tiers": KvTiersConfig(balancing_threshold=1.0)})
    problem = Dispatch()
    means = []
    for rule in ("random", "token-least-load", "conductor", "conductor:threshold=1"):
        episodes = problem.episodes(fetching if ":" in rule else scenario, [0, 1])
        metrics = episodes.play(problem.resolve(f"{rule}+least-tpot")).metrics
        means.append(sum(m["ttft_mean_s"] for m in metrics) / 2)
    assert means[0] > 1.3 * means[1] > 1.3 * 1.1 * means[2] > 1.3 * 1.1 * 1.05 * means[3]
