"""DistServe's placement: instances of each phase, searched alone and shared out."""

from __future__ import annotations

import pytest

from servegym.errors import ConfigError
from servegym.evaluate.placement import (
    Instance,
    Placement,
    distserve_placement,
    split_scenario,
)
from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario


def chats(prompt_tokens: float) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "chats",
            "engine": {"prefix_caching": False},
            "fleet": [{"gpu": "A100-SXM-80GB", "count": 6}],
            "workload": {
                "kind": "generated",
                "rate_rps": 3e4 / prompt_tokens,
                "prompt": {"medians_tokens": [prompt_tokens], "sigmas": [0.3]},
                "output": {"medians_tokens": [150.0], "sigmas": [0.5], "max_tokens": 600},
            },
            "slo_classes": [{"name": "all", "ttft_s": 1.0, "tpot_s": 0.02}],
            "num_requests": 150,
        }
    )


def test_the_scarcer_phase_is_what_a_placement_bears():
    placement = Placement(Instance(2, 0.3), 2, Instance(1, 0.2), 4)
    assert placement.load == 0.6
    assert placement.num_gpus == 8


def test_longer_prompts_want_more_to_prefill_and_the_split_bears_what_was_foreseen():
    short, long = (distserve_placement(chats(n), 6, num_seeds=1) for n in (300.0, 3000.0))
    assert short.num_prefill < long.num_prefill
    assert 0.5 < short.prefill.load / long.prefill.load < 2.0  # of a rate ten times as high
    assert long.num_gpus <= 6
    fleet = split_scenario(chats(3000.0), long.num_prefill, 6 - long.num_prefill)
    problem = Dispatch()
    policy = problem.resolve("token-least-load+least-tpot")

    def attained(load: float) -> float:
        [metrics] = problem.episodes(fleet, [0], load=load).play(policy).metrics
        return metrics["slo_attainment"]

    assert attained(0.8 * long.load) > 0.9
    assert attained(1.8 * long.load) < 0.8


def test_a_rate_at_which_no_load_is_the_answer_is_refused():
    slow = chats(300.0)
    workload = slow.workload.model_copy(update={"rate_rps": 0.01})
    with pytest.raises(ConfigError, match=r"1 GPUs that are to prefill .* nearer to them"):
        distserve_placement(slow.model_copy(update={"workload": workload}), 4, num_seeds=1)


def test_both_phases_need_a_gpu():
    with pytest.raises(ConfigError, match="must be at least 4, to prefill and to decode, got 3"):
        distserve_placement(chats(300.0), 3, tps=(2,), num_seeds=1, num_requests=30)
