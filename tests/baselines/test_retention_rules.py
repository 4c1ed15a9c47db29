"""Rules for the KV of ended turns: choices by hand, and what they bring on a small cluster."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.ordering.registry import RULES as ORDERS
from servegym.baselines.placement import PLACEMENTS
from servegym.baselines.retention.registry import RETENTIONS, retention
from servegym.cluster.state import KEEP, LEAVE, OFFLOAD
from servegym.errors import ConfigError
from servegym.export.resolve import resolve_dispatch
from servegym.policy.retention import Kept, Turn
from servegym.policy.run_kept import make_simulator, run_kept
from servegym.scenario import load_scenario

TURN = Turn(
    now_s=100.0,
    kept_tokens=8000,
    kv_share=0.1,
    recompute_s=2.0,
    tiered=True,
    tool=0,
    gaps_s=np.zeros(0),
    back_s=math.nan,
)


def decided(text: str, **known: object) -> tuple[int, float]:
    return retention(text).retain(TURN._replace(**known))


def test_lru_keeps_nothing_and_offloads_where_it_can():
    assert decided("lru") == (OFFLOAD, 0.0)
    assert decided("lru", tiered=False) == (LEAVE, 0.0)


def test_ttl_keeps_every_turn_for_its_time():
    assert decided("ttl:seconds=7") == (KEEP, 7.0)


def test_lognormal_keeps_until_the_quantile_of_the_gaps_unless_that_is_long():
    # logarithms 0 and 2 log 2, half each: mean log 2, deviation log 2; the 84 % quantile is 4
    gaps_s = np.array([1.0, 4.0] * 4)
    one_sigma = "lognormal:quantile=0.8413447460685429"
    answer, keep_s = decided(f"{one_sigma},most=5", gaps_s=gaps_s)
    assert (answer, keep_s) == (KEEP, pytest.approx(4.0))
    assert decided(f"{one_sigma},most=3", gaps_s=gaps_s) == (OFFLOAD, 0.0)
    assert decided(f"{one_sigma},most=3", gaps_s=gaps_s, tiered=False) == (LEAVE, 0.0)
    assert decided("lognormal", gaps_s=gaps_s[:7]) == (KEEP, 10.0)  # seven are too few to say


def test_only_turns_that_are_back_soon_are_offloaded():
    gaps_s = np.array([1.0, 4.0] * 4)  # geometric mean 2
    assert decided("offload-within:seconds=2.01", gaps_s=gaps_s) == (OFFLOAD, 0.0)
    assert decided("offload-within:seconds=1.99", gaps_s=gaps_s) == (LEAVE, 0.0)
    assert decided("offload-within:seconds=9", gaps_s=gaps_s, tiered=False) == (LEAVE, 0.0)
    # seven are too few to say: 10 s
    assert decided("offload-within:seconds=11", gaps_s=gaps_s[:7]) == (OFFLOAD, 0.0)
    assert decided("offload-within:seconds=0", gaps_s=gaps_s[:7]) == (LEAVE, 0.0)
    assert decided("offload-within:seconds=1e9", gaps_s=1e6 * gaps_s) == (OFFLOAD, 0.0)


def test_by_tool_keeps_for_the_time_that_pays_most():
    # six of eight are back in 1 s, one in 3 s and one in 100 s. Times, chances and mean times held:
    # 1 s: 6/8, 1 s; 3 s: 7/8, (6 * 1 + 3 + 3) / 8 = 1.5 s; 100 s: 1, (6 + 3 + 100) / 8 = 13.625 s
    gaps_s = np.array([100.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    # at a price of 1: 1.5 - 0.1, 1.75 - 0.15 and 2 - 1.36
    assert decided("by-tool:price=1", gaps_s=gaps_s) == (KEEP, 3.0)
    # at 0.1: 1.5 - 0.01, 1.75 - 0.015, 2 - 0.136
    assert decided("by-tool:price=0.1", gaps_s=gaps_s) == (KEEP, 100.0)
    # at 6: 1.5 - 0.6, 1.75 - 0.9
    assert decided("by-tool:price=6", gaps_s=gaps_s) == (KEEP, 1.0)
    assert decided("by-tool:price=20", gaps_s=gaps_s) == (
        OFFLOAD,
        0.0,
    )  # not even 1.5 - 2 is worth it
    assert decided("by-tool", gaps_s=gaps_s[:7]) == (KEEP, 10.0)


def test_belady_lets_go_first_of_whom_is_back_last():
    # retained turns let go by the end of their time; back at 105, 120 and 108
    ends_s = []
    for now_s, back_s in ((100.0, 5.0), (101.0, 19.0), (102.0, 6.0)):
        answer, keep_s = decided("belady", now_s=now_s, back_s=back_s)
        assert answer == KEEP
        ends_s.append(now_s + keep_s)
    assert np.argsort(ends_s).tolist() == [1, 2, 0]


def test_belady_is_refused_where_nobody_knows_the_future():
    with pytest.raises(ConfigError, match="which only a simulator can tell: choose another"):
        decided("belady")


def test_rules_are_named_behind_a_dispatch_policy():
    assert set(RETENTIONS.names()).isdisjoint([*ORDERS.names(), *PLACEMENTS.names()])
    made = resolve_dispatch("prefix-load+by-tool:price=2")
    assert isinstance(made, Kept)
    assert made.name == "prefix-load+by-tool:price=2"
    assert (made.information, resolve_dispatch("random+belady").information) == (
        "predictive",
        "oracle",
    )
    with pytest.raises(
        ConfigError, match="unknown order, placement, migration or retention 'bellady'"
    ):
        resolve_dispatch("prefix-load+bellady")


@pytest.fixture(scope="module")
def scenario():
    """Agents whose KV does not fit, and no tiers: what is not kept is computed anew."""
    agents = load_scenario("agent-sessions")
    fleet = (agents.fleet[0].model_copy(update={"count": 1, "num_blocks": 1600}),)
    workload = agents.workload.model_copy(update={"rate_rps": 0.25})
    return agents.model_copy(update={"fleet": fleet, "workload": workload, "num_requests": 150})


def test_who_knows_when_turns_come_back_computes_least_anew(scenario):
    hits = {}
    for text in RETENTIONS:
        episodes = [scenario.episode(seed) for seed in range(3)]
        policy = resolve_dispatch(f"least-outstanding+{text}")
        assert isinstance(policy, Kept)
        sim = make_simulator(scenario.spec, episodes)
        run_kept(sim, policy)
        outcomes = np.concatenate([sim.outcomes(env) for env in range(3)])
        hits[text] = outcomes["cached_tokens"].sum() / outcomes["prompt_tokens"].sum()
    assert len(hits) == 6
    assert max(hits, key=hits.__getitem__) == "belady"
    assert hits["belady"] > hits["lru"] + 0.01


def test_nothing_is_decided_without_a_prefix_cache_or_where_kv_moves():
    off = replace(load_scenario("homogeneous-light").spec, prefix_caching=False)
    with pytest.raises(ConfigError, match="prefix cache, which is off: turn it on, or take"):
        make_simulator(off, [])
    with pytest.raises(ConfigError, match="do not go together yet: take the dispatch policy alone"):
        make_simulator(load_scenario("pd-equal").spec, [])
