"""A fleet of several engines: from a scenario file, under every rule and in the environments."""

from __future__ import annotations

import asyncio
import re
import warnings

import aiohttp
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from servegym.baselines.registry import RULES, policy
from servegym.cluster.simulator import Simulator
from servegym.engines import ENGINES
from servegym.errors import ConfigError
from servegym.policy.run import run
from servegym.scenario import Scenario, parse_scenario
from servegym.serve.engine.fleet import Fleet, FleetConfig
from servegym.serve.metrics import SGLANG, TENSORRT_LLM, VLLM, read_metrics

MIXED = """
name: mixed-engines
engine: {max_num_seqs: 24}
fleet:
  - {gpu: A100-SXM-80GB, num_blocks: 900}
  - {gpu: A100-SXM-80GB, num_blocks: 900, engine: vllm-v0, max_num_batched_tokens: 8192}
  - {gpu: A100-SXM-80GB, num_blocks: 900, engine: sglang, max_num_seqs: 48}
  - {gpu: A100-SXM-80GB, num_blocks: 900, engine: trtllm, max_num_batched_tokens: 8192}
workload:
  kind: generated
  rate_rps: 40.0
  prompt: {medians_tokens: [300.0], sigmas: [0.8], max_tokens: 4000}
  output: {medians_tokens: [150.0], sigmas: [0.8], max_tokens: 1000}
disturbances:
  metrics_interval_s: 0.2
  step_noise_sigma: 0.1
  fail_slow: {rate_per_replica_hour: 600.0, duration_s: 2.0, multiplier: [0.1, 0.4]}
  fail_stop: {rate_per_replica_hour: 600.0, recovery_s: 1.0}
actions: {hold: true, reject: true}
num_requests: 200
"""


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return parse_scenario(MIXED, "mixed.yaml")


def test_a_fleet_entry_says_whose_rules_its_replicas_follow(scenario):
    types = scenario.spec.types
    assert [t.engine for t in types] == [e for e in ENGINES if e != "vllm-priority"]
    # those of the second and the last are given, the others the engine's own
    assert [t.max_num_batched_tokens for t in types] == [2048, 8192, 8192, 8192]
    assert [t.max_num_seqs for t in types] == [24, 24, 48, 24]
    assert [t.name for t in types[:2]] == ["A100-SXM-80GB x1", "A100-SXM-80GB x1 vllm-v0"]


def test_the_budget_of_the_scenario_counts_for_every_engine_that_has_none_of_its_own():
    text = MIXED.replace("max_num_seqs: 24", "max_num_seqs: 24, max_num_batched_tokens: 5120")
    types = parse_scenario(text, "mixed.yaml").spec.types
    assert [t.max_num_batched_tokens for t in types] == [5120, 8192, 5120, 8192]


def test_an_unknown_engine_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"fleet.0.engine: input should be 'vllm', 'vllm-v0'"):
        parse_scenario(MIXED.replace("num_blocks: 900}", "engine: vlm}"), "mixed.yaml")


@pytest.mark.parametrize("name", RULES.names())
def test_every_dispatch_rule_plays_to_the_end(scenario, name):
    simulator = Simulator(scenario.spec, [scenario.episode(1, num_requests=60)], record=True)
    run(simulator, policy(name))
    outcomes = simulator.outcomes()
    finished = outcomes[~outcomes["rejected"]]
    assert len(finished)
    assert (finished["finish_s"] >= finished["first_token_s"]).all()
    assert simulator.state.env[0]["in_system"] == 0


def test_the_environment_passes_gymnasiums_checker_without_warnings(scenario):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("servegym/Dispatch-v1", scenario=scenario, num_requests=30)
        check_env(env.unwrapped)


def test_vector_environments_play_episodes_with_failing_replicas_of_all_engines(scenario):
    env = gymnasium.make_vec("servegym/Dispatch-v1", num_envs=8, scenario=scenario)
    observation, _ = env.reset(seed=3)
    rng = np.random.default_rng(0)
    ended = np.zeros(8, int)
    while (ended < 2).any():
        mask = observation["action_mask"].astype(bool)
        chosen = [int(rng.choice(np.flatnonzero(row))) for row in mask]
        observation, reward, terminated, truncated, _ = env.step(np.array(chosen))
        assert np.isfinite(reward).all()
        assert np.isfinite(observation["replicas"]).all()
        ended += terminated | truncated
    env.close()


def test_no_engine_loses_a_request_when_it_fails(scenario):
    simulator = Simulator(scenario.spec, [scenario.episode(2)], record=True)
    run(simulator, policy("least-outstanding"))
    outcomes = simulator.outcomes()
    assert outcomes["num_restarts"].sum() > 0
    assert not np.isnan(outcomes["finish_s"]).any()
    assert not simulator.state.replica[0]["num_running"].any()


METRICS = (
    ("vllm:num_requests_waiting", VLLM),
    ("vllm:gpu_cache_usage_perc", VLLM),
    ("sglang:num_queue_reqs", SGLANG),
    ("trtllm_num_requests_waiting", TENSORRT_LLM),
)


def test_all_engines_of_a_fleet_are_served_under_their_own_names(scenario):
    async def test():
        fleet = Fleet(FleetConfig(scenario=scenario, port=0, speed=20.0))
        await fleet.start()
        async with aiohttp.ClientSession() as session:
            for server, (name, names) in zip(fleet.servers.values(), METRICS, strict=True):
                body = {"prompt": "x" * 400, "max_tokens": 30, "ignore_eos": True}
                async with session.post(f"{server.url}/v1/completions", json=body) as response:
                    assert (await response.json())["usage"]["completion_tokens"] == 30
                async with session.get(f"{server.url}/metrics") as response:
                    page = await response.text()
                assert f"\n{name}{{" in page
                read = read_metrics(page, names)
                assert (read.num_running, read.num_waiting, read.kv_cache_usage) == (0, 0, 0)
                assert read.kv_capacity_tokens == 900 * 16
                assert re.search(r"generation_tokens_total{.*} 30.0\n", page)
            async with session.get(f"{server.url}/prometheus/metrics") as response:
                assert await response.text() == page
        await fleet.stop()

    asyncio.run(asyncio.wait_for(test(), 30))
