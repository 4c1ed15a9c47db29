"""Metrics against numbers computed by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.cluster.outcome import OUTCOME_DTYPE, STEP_DTYPE, within_slo
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode, TransferRules
from servegym.cluster.state import ITL_BINS_PER_DECADE, ITL_FIRST_S, NUM_ITL_BINS
from servegym.cluster.tier_rules import KvTier, TierRules
from servegym.policy.run import run
from servegym.problems.request_metrics import itl_percentile, measure, unloaded_s
from servegym.workloads.table import RequestTable

NO_ITL = np.zeros(NUM_ITL_BINS, np.int64)
NO_STEPS = np.zeros(0, STEP_DTYPE)


@pytest.fixture(scope="module")
def spec(make_scenario):
    return make_scenario(
        slo_classes=[
            {"name": "fast", "ttft_s": 1.0, "tpot_s": 0.5},
            {"name": "slow", "ttft_s": 4.0, "tpot_s": 2.0},
        ]
    ).spec


@pytest.fixture(scope="module")
def episode(make_scenario):
    arrival_s = np.array([0.0, 10.0, 11.0, 12.0, 16.0, 18.0])
    table = RequestTable.build(arrival_s, np.full(6, 100), np.full(6, 5))
    return dataclasses.replace(make_scenario().episode(0), table=table)  # one H100, two L40S


def fates(*rows: tuple[float, ...]) -> np.ndarray:
    """Rows of (arrival, scheduled, first token, finish, output tokens, SLO class)."""
    out = np.zeros(len(rows), OUTCOME_DTYPE)
    for name, column in zip(
        ("arrival_s", "scheduled_s", "first_token_s", "finish_s", "output_tokens", "slo_class"),
        zip(*rows, strict=True),
        strict=True,
    ):
        out[name] = column
    out["prompt_tokens"] = 100
    return out


@pytest.fixture
def six() -> np.ndarray:
    """Six requests; the first, a fifth of them rounded down, is left out as warm-up."""
    out = fates(
        (0.0, 90.0, 95.0, 99.0, 2, 0),
        (10.0, 10.5, 11.0, 13.0, 5, 0),  # ttft 1.0, e2e 3, tpot 2/4 = 0.5: just within
        (11.0, 12.0, 13.0, 13.0, 1, 0),  # ttft 2.0: too late
        (12.0, 12.0, 14.0, 20.0, 4, 1),  # ttft 2.0, e2e 8, tpot 6/3 = 2: just within
        (16.0, 19.0, 20.0, 26.0, 3, 1),  # ttft 4.0, e2e 10, tpot 6/2 = 3: too slow
        (18.0, np.nan, np.nan, 18.5, 9, 1),  # rejected
    )
    out["rejected"][5] = True
    out["cached_tokens"][:5] = [100, 50, 0, 25, 25]
    out["num_preemptions"][:5] = [3, 0, 1, 0, 0]
    out["num_holds"][5] = 2
    out["num_restarts"][2] = 1
    return out


def test_latencies_of_six_requests(six, spec, episode):
    got = measure(six, NO_STEPS, NO_ITL, spec, episode)
    assert got["ttft_mean_s"] == pytest.approx(2.25)  # (1 + 2 + 2 + 4) / 4
    assert got["ttft_p50_s"] == 2.0
    assert got["e2e_mean_s"] == pytest.approx(5.75)  # (3 + 2 + 8 + 10) / 4
    assert got["e2e_p50_s"] == 5.5  # half-way between 3 and 8
    # 90 % of the way along 2, 3, 8, 10: 0.9 * 3 = 2.7, so 8 + 0.7 * 2
    assert got["e2e_p90_s"] == pytest.approx(9.4)
    assert got["tpot_mean_s"] == pytest.approx(5.5 / 3)  # 0.5, 2, 3; one token has none
    assert got["queue_mean_s"] == pytest.approx(1.125)  # (0.5 + 1 + 0 + 3) / 4
    assert got["max_wait_s"] == 3.0
    # 3/5, 2/1, 8/4, 10/3 seconds a token
    assert got["normalised_latency_s"] == pytest.approx((0.6 + 2.0 + 2.0 + 10 / 3) / 4)


def test_goodput_of_six_requests(six, spec, episode):
    assert within_slo(six, spec).tolist() == [False, True, False, True, False, False]
    got = measure(six, NO_STEPS, NO_ITL, spec, episode)
    assert got["slo_attainment"] == pytest.approx(2 / 5)  # a rejected request missed its limits
    assert got["slo_attainment_fast"] == pytest.approx(1 / 2)
    assert got["slo_attainment_slow"] == pytest.approx(1 / 3)
    assert got["goodput_rps"] == pytest.approx(2 / 8)  # arrivals from 10 to 18 s
    assert got["goodput_rps_per_gpu"] == pytest.approx(2 / 8 / 3)
    usd_per_s = sum(spec.types[t].price_usd_per_h for t in (0, 1, 1)) / 3600
    assert usd_per_s > 0
    assert got["goodput_per_usd"] == pytest.approx(2 / 8 / usd_per_s)


def test_late_followers_do_not_stretch_the_time_that_goodput_is_counted_over(six, spec, episode):
    # request 3 would have come at 12 s, but waited for a slow answer until 100 s
    after = np.array([-1, -1, -1, 1, -1, -1])
    delay_s = np.array([0.0, 0.0, 0.0, 2.0, 0.0, 0.0])
    closed = dataclasses.replace(episode.table, after=after, delay_s=delay_s)
    late = six.copy()
    for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"):
        late[name][3] += 88.0
    assert within_slo(late, spec).tolist() == [False, True, False, True, False, False]
    waiting = dataclasses.replace(episode, table=closed)
    got = measure(late, NO_STEPS, NO_ITL, spec, waiting)
    assert got["goodput_rps"] == pytest.approx(1 / 8)  # from 10 to 18 s, by then one was in time
    assert got["slo_attainment"] == pytest.approx(2 / 5)
    # the same requests are judged, whenever they come: without the first of the table
    assert got["e2e_mean_s"] == pytest.approx((3 + 2 + 8 + 10) / 4)
    # clients take the next request when they are free: theirs end with the last arrival
    anyone = dataclasses.replace(closed, after=np.array([-1, -1, -1, -2, -1, -1]))
    got = measure(late, NO_STEPS, NO_ITL, spec, dataclasses.replace(episode, table=anyone))
    assert got["goodput_rps"] == pytest.approx(2 / 90)


def test_counts_of_six_requests(six, spec, episode):
    got = measure(six, NO_STEPS, NO_ITL, spec, episode)
    # counts are of all requests, warm-up included
    names = ("preemptions", "restarts", "holds", "rejected")
    assert [got[n] for n in names] == [4.0, 1.0, 2.0, 1.0]
    assert got["prefix_hit_rate"] == pytest.approx(100 / 500)  # 50 + 0 + 25 + 25 + 0 of 5 * 100


def test_warmup_share_is_left_out_of_latencies(six, spec, episode):
    got = measure(six, NO_STEPS, NO_ITL, spec, episode, warmup=0.0)
    assert got["e2e_mean_s"] == pytest.approx((99 + 3 + 2 + 8 + 10) / 5)
    got = measure(six, NO_STEPS, NO_ITL, spec, episode, warmup=0.5)
    assert got["e2e_mean_s"] == pytest.approx((8 + 10) / 2)


def test_steps_are_weighted_by_their_length(six, spec, episode):
    steps = np.zeros(3, STEP_DTYPE)
    steps["begin_s"], steps["end_s"] = [0.0, 1.0, 0.0], [1.0, 4.0, 2.0]
    steps["replica"] = [0, 0, 1]
    steps["num_decodes"] = [4, 8, 2]
    blocks = [spec.types[t].num_blocks for t in (0, 1)]
    steps["used_blocks"] = [blocks[0] // 2, blocks[0] // 4, blocks[1]]
    got = measure(six, steps, NO_ITL, spec, episode)
    assert got["batch_mean"] == pytest.approx((1 * 4 + 3 * 8 + 2 * 2) / 6)
    assert got["kv_use_mean"] == pytest.approx((1 * 0.5 + 3 * 0.25 + 2 * 1.0) / 6, rel=1e-3)
    assert got["kv_use_max"] == 1.0
    # busy 4, 2 and 0 s: mean 2, variance (4 + 0 + 4) / 3
    assert got["busy_cv"] == pytest.approx((8 / 3) ** 0.5 / 2)


def test_loads_are_told_from_transfers(six, spec, episode):
    first, second = spec.types[:2]
    apart = dataclasses.replace(
        spec,
        types=(
            dataclasses.replace(first, role="prefill"),
            dataclasses.replace(second, role="decode"),
        ),
        prefix_caching=True,
        transfers=TransferRules(kv_token_bytes=2.0),
        tiers=TierRules(store=KvTier(100), balancing_threshold=1.0),
    )
    six["prefilled_s"] = [np.nan, 10.8, 12.5, np.nan, 19.0, np.nan]
    # the third was preempted where it decodes and loaded there; the fourth was only loaded
    six["transfer_s"] = [np.nan, 10.9, 12.9, 11.5, 19.5, np.nan]
    six["landed_s"] = [np.nan, 11.0, 13.0, 12.0, 19.9, np.nan]
    six["moved_bytes"] = [0, 200 + 40, 200 + 20, 100, 200, 0]
    six["store_tokens"][1], six["host_tokens"][2], six["peer_tokens"][3] = 20, 10, 50
    got = measure(six, NO_STEPS, NO_ITL, apart, episode)
    assert got["transferred_share"] == 3 / 5
    assert got["moved_gb"] == pytest.approx(600e-9)
    assert got["loaded_gb"] == pytest.approx(160e-9)
    assert got["loaded_share"] == 3 / 5
    assert got["loaded_from_store"] == 20 / 500
    assert got["loaded_from_peer"] == 50 / 500
    assert got["prefill_mean_s"] == pytest.approx((0.8 + 3.0) / 2)
    assert got["unfetched_mean_s"] == pytest.approx((0.1 + 0.5) / 2)
    assert got["transfer_mean_s"] == pytest.approx((0.1 + 0.4) / 2)
    assert "load_mean_s" not in got


def test_fairness_compares_the_slowdown_of_tenants(spec, episode):
    out = fates(*[(float(i), float(i), i + 1.0, i + 2.0, 10, 1) for i in range(4)])
    out["tenant"] = [0, 1, 0, 1]
    assert measure(out, NO_STEPS, NO_ITL, spec, episode, 0.0)["fairness_jain"] == pytest.approx(1.0)
    out["finish_s"][[1, 3]] += 4.0  # equal requests, one tenant's take 6 s, the other's 2 s
    # (1 + 3)^2 / (2 * (1 + 9))
    assert measure(out, NO_STEPS, NO_ITL, spec, episode, 0.0)["fairness_jain"] == pytest.approx(0.8)


def test_lone_request_on_the_fastest_replica_has_slowdown_one(make_scenario):
    scenario = make_scenario()
    table = RequestTable.build(
        np.array([0.0, 100.0, 200.0]), np.array([50, 700, 5000]), np.array([20, 100, 400])
    )
    lone = Episode(table, np.array([0], np.int16), np.ones(1))
    simulator = Simulator(scenario.spec, [lone])
    run(simulator, policy("round-robin"))
    fate = simulator.outcomes()
    slowdown = (fate["finish_s"] - fate["arrival_s"]) / unloaded_s(fate, scenario.spec)
    np.testing.assert_allclose(slowdown, 1.0, rtol=0.02)


def test_inter_token_percentile_is_within_half_a_bin():
    counts = NO_ITL.copy()
    width = 10 ** (1 / ITL_BINS_PER_DECADE)
    for value, count in ((0.010, 98), (0.5, 2)):
        counts[int(np.log10(value / ITL_FIRST_S) * ITL_BINS_PER_DECADE)] = count
    assert itl_percentile(counts, 50) == pytest.approx(0.010, rel=width - 1)
    assert itl_percentile(counts, 98) == pytest.approx(0.010, rel=width - 1)
    assert itl_percentile(counts, 99) == pytest.approx(0.5, rel=width - 1)
    assert np.isnan(itl_percentile(NO_ITL, 50))


def test_recorded_inter_token_times_agree_with_tpot(make_scenario):
    # one request at a time: every gap is about the request's mean
    scenario = make_scenario()
    table = RequestTable.build(np.arange(20) * 100.0, np.full(20, 64), np.full(20, 101))
    alone = Episode(table, np.array([0], np.int16), np.ones(1))
    simulator = Simulator(scenario.spec, [alone], record=True)
    run(simulator, policy("round-robin"))
    got = measure(
        simulator.outcomes(), simulator.steps(), simulator.itl_histogram(), scenario.spec, alone
    )
    assert got["itl_p50_s"] == pytest.approx(got["tpot_mean_s"], rel=0.05)
    assert got["batch_mean"] <= 1.0
    assert simulator.itl_histogram().sum() == 20 * 100  # a gap before each token but the first


def test_limits_are_inclusive(spec):
    exact = fates((0.0, 0.0, 1.0, 1.5, 2, 0))
    late = exact.copy()
    late["first_token_s"] += 1e-9
    assert within_slo(exact, spec).tolist() == [True]
    assert within_slo(late, spec).tolist() == [False]


def test_no_price_means_no_goodput_per_dollar(six, spec, episode):
    free = dataclasses.replace(
        spec, types=tuple(dataclasses.replace(t, price_usd_per_h=0.0) for t in spec.types)
    )
    assert np.isnan(measure(six, NO_STEPS, NO_ITL, free, episode)["goodput_per_usd"])
