"""Paired comparisons, common random numbers, the document and the saturation search."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.evaluate.compare import paired_difference, paired_ratio
from servegym.evaluate.document import evaluation_document, write_json
from servegym.evaluate.harness import FIRST_SEED, evaluate
from servegym.evaluate.saturation import saturation_load
from servegym.evaluate.table import comparison_table, saturation_table


def test_ratio_is_the_geometric_mean_of_pairs():
    got = paired_ratio(np.array([1.0, 8.0]), np.array([2.0, 1.0]))
    assert got.value == pytest.approx(2.0)  # sqrt(1/2 * 8)
    assert got.num_pairs == 2
    assert 0.5 <= got.low <= got.value <= got.high <= 8.0


def test_pairs_without_a_value_are_left_out():
    metric, reference = np.array([1.0, np.nan, 3.0, 0.0]), np.array([2.0, 1.0, 6.0, 5.0])
    got = paired_ratio(metric, reference)
    assert (got.value, got.low, got.high, got.num_pairs) == pytest.approx((0.5, 0.5, 0.5, 2))


def test_one_pair_has_an_infinite_interval_and_none_has_no_value():
    assert paired_ratio(np.array([3.0]), np.array([2.0])) == (1.5, 0.0, math.inf, 1)
    none = paired_ratio(np.array([np.nan]), np.array([1.0]))
    assert math.isnan(none.value)
    assert none.num_pairs == 0


def test_interval_contains_the_truth_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    truth, hits, draws = 0.9, 0, 400
    for _ in range(draws):
        reference = rng.lognormal(0.0, 0.8, 30)  # what the seeds share
        metric = truth * reference * rng.lognormal(0.0, 0.1, 30)
        got = paired_ratio(metric, reference)
        hits += got.low <= truth <= got.high
        assert got.high / got.low < 1.2  # pairing removes the seeds' own spread
    # standard error sqrt(0.95 * 0.05 / 400) = 1.1 %; a percentile bootstrap of 30 is a bit narrow
    assert 0.90 <= hits / draws <= 0.985


def test_interval_is_the_same_every_time():
    rng = np.random.default_rng(1)
    a, b = rng.lognormal(size=(2, 12))
    assert paired_ratio(a, b) == paired_ratio(a, b)


@pytest.mark.parametrize("name", ["speed-family", "random", "power-of-two"])
def test_the_same_policy_under_another_name_has_ratio_one(make_scenario, name):
    first, second = policy(name), dataclasses.replace(policy(name), name="copy")
    result = evaluate(make_scenario(), [first, second], num_seeds=4)
    for metric in ("e2e_mean_s", "ttft_p99_s", "tpot_mean_s"):
        assert result.ratio("copy", name, 1.0, metric) == (1.0, 1.0, 1.0, 4)
    assert len(set(result.values(name, 1.0, "e2e_mean_s"))) == 4  # seeds differ


def test_result_does_not_depend_on_what_else_is_compared(make_scenario):
    alone = evaluate(make_scenario(), [policy("random")], num_seeds=2)
    second = evaluate(make_scenario(), [policy("round-robin"), policy("random")], num_seeds=2)
    for metric in ("e2e_mean_s", "ttft_mean_s"):
        np.testing.assert_array_equal(
            alone.values("random", 1.0, metric), second.values("random", 1.0, metric)
        )


def test_requests_are_held_out_and_the_same_for_every_policy(compared):
    assert compared.seeds == [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 2]
    assert len(compared.runs) == 3 * 2 * 3
    for load in compared.loads:
        trails = [compared.trails[name, load].outcomes for name, _ in compared.policies]
        for column in ("arrival_s", "prompt_tokens", "output_tokens"):
            for other in trails[1:]:
                np.testing.assert_array_equal(trails[0][column], other[column])


def test_best_heuristic_is_no_oracle_and_not_learned(compared):
    means = {n: compared.mean(n, 1.5, "e2e_mean_s") for n, _ in compared.policies}
    assert means["speed-family"] < means["round-robin"]
    assert compared.best_heuristic(1.5) == "speed-family"
    learned = dataclasses.replace(compared, learned=["speed-family"])
    assert learned.best_heuristic(1.5) == "round-robin"


def test_more_load_means_more_latency(compared):
    assert compared.policies
    for name, _ in compared.policies:
        assert compared.mean(name, 1.5, "e2e_mean_s") > compared.mean(name, 0.5, "e2e_mean_s")


@pytest.mark.parametrize("num_seeds", [0, -1])
def test_no_seed_is_refused(make_scenario, num_seeds):
    with pytest.raises(ConfigError, match=f"seeds must be at least 1, got {num_seeds}"):
        evaluate(make_scenario(), [policy("random")], num_seeds=num_seeds)


def test_two_policies_of_one_name_are_refused(make_scenario):
    with pytest.raises(ConfigError, match="every policy needs its own name"):
        evaluate(make_scenario(), [policy("random"), policy("random")])


def test_decisions_are_timed(compared):
    assert compared.policies
    for name, _ in compared.policies:
        median, high = compared.decision_s[name]
        assert 0 < median <= high < 1


def test_document_has_stable_keys(compared):
    document = evaluation_document(compared)
    assert set(document) == {
        "bound",
        "aggregates",
        "command",
        "decision_s",
        "loads",
        "notes",
        "problem",
        "runs",
        "saturation_load",
        "scenario",
        "scenario_sha256",
        "schema",
        "seeds",
        "seeds_asked",
        "servegym_version",
        "trace",
        "uncertainty",
    }
    assert document["schema"] == "servegym-evaluation-1"
    assert len(document["aggregates"]) == 3 * 2
    assert len(document["runs"]) == 3 * 2 * 3
    (first, *_) = document["aggregates"]
    assert set(first) == {
        "difference",
        "headroom",
        "ratio",
        "information",
        "load",
        "metrics",
        "policy",
    }
    assert first["headroom"] is None  # no bound was asked for
    for comparison in (first["ratio"], first["difference"]):
        assert set(comparison) == {"ci95", "metric", "num_pairs", "reference", "value"}
    assert set(document["runs"][0]) == {"load", "metrics", "policy", "seed"}
    assert set(document["runs"][0]["metrics"]) == set(first["metrics"])
    latencies = {
        f"{what}_{how}_s"
        for what in ("ttft", "tpot", "e2e", "itl")
        for how in ("mean", "p50", "p90", "p95", "p99")
    } - {"itl_mean_s"}
    assert set(first["metrics"]) == latencies | {
        "queue_mean_s",
        "slo_attainment",
        "slo_attainment_fast",
        "slo_attainment_slow",
        "goodput_rps",
        "goodput_rps_per_gpu",
        "goodput_per_usd",
        "normalised_latency_s",
        "slowdown_mean",
        "slowdown_p99",
        "fairness_jain",
        "max_wait_s",
        "preemptions",
        "restarts",
        "holds",
        "rejected",
        "prefix_hit_rate",
        "kv_use_mean",
        "kv_use_max",
        "batch_mean",
        "busy_cv",
    }


def test_document_says_what_was_played(compared):
    document = evaluation_document(compared)
    text = compared.scenario.model_dump_json()
    assert document["scenario_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert type(compared.scenario).model_validate(document["scenario"]) == compared.scenario
    best = document["aggregates"][1]
    assert (best["policy"], best["load"]) == ("speed-family", 0.5)
    assert best["ratio"] == {
        "metric": "e2e_mean_s",
        "reference": "speed-family",
        "value": 1.0,
        "ci95": [1.0, 1.0],
        "num_pairs": 3,
    }


def test_written_document_has_no_nan_even_from_one_seed(make_scenario, tmp_path):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    policies = [policy("round-robin"), policy("speed-family")]
    # one request of one token: no time per output token, no second pair
    one_token = {"medians_tokens": [1.0], "max_tokens": 1}
    workload = {"kind": "generated", "rate_rps": 30.0, "output": one_token}
    result = evaluate(make_scenario(workload=workload), policies, num_seeds=1, num_units=1)
    path = tmp_path / "deep" / "er" / "result.json"
    write_json(result, path)
    document = json.loads(path.read_text(), parse_constant=refuse)
    assert document["runs"][0]["metrics"]["tpot_mean_s"] is None
    assert document["aggregates"][0]["ratio"]["ci95"][1] is None
    assert document["runs"][0]["metrics"]["e2e_mean_s"] > 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_requests", [1, 2, 7])
def test_short_episodes_are_measured_without_warnings(make_scenario, num_requests):
    result = evaluate(make_scenario(), [policy("round-robin")], num_seeds=1, num_units=num_requests)
    evaluation_document(result)
    assert result.mean("round-robin", 1.0, "e2e_mean_s") > 0


def test_saturation_falls_with_the_share_and_rises_with_the_policy(make_scenario):
    scenario = make_scenario(
        slo_classes=[{"name": "all", "ttft_s": 0.2, "tpot_s": 0.03}], num_requests=200
    )
    found = {
        (name, share): saturation_load(scenario, policy(name), share, num_seeds=2, tolerance=0.05)
        for name in ("round-robin", "speed-family")
        for share in (0.5, 0.9, 0.99)
    }
    for name in ("round-robin", "speed-family"):
        assert found[name, 0.5] >= found[name, 0.9] >= found[name, 0.99]
        assert found[name, 0.5] > found[name, 0.99]
    assert found["speed-family", 0.9] > found["round-robin", 0.9]
    # what was found is met, and 5 % more is not
    best, load = policy("speed-family"), found["speed-family", 0.9]
    for factor, met in ((1.0, True), (1.05, False)):
        result = evaluate(scenario, [best], loads=[factor * load], num_seeds=2)
        attained = result.mean(best.name, factor * load, "slo_attainment")
        assert (attained >= 0.9) == met


@pytest.mark.parametrize(("limit_s", "load"), [(1e-6, 0.0), (1e5, 4.0)])
def test_saturation_ends_at_its_bounds(make_scenario, limit_s, load):
    scenario = make_scenario(
        slo_classes=[{"name": "all", "ttft_s": limit_s, "tpot_s": limit_s}], num_requests=30
    )
    assert saturation_load(scenario, policy("random"), 0.9, num_seeds=1) == load


def shown(table, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 132, 200])
def test_table_fits_the_terminal_best_first(compared, width):
    lines = shown(comparison_table(compared, 1.5, width), width)
    assert max(map(len, lines)) <= width
    rows = [line.split()[0] for line in lines if line.strip().endswith("]")]
    means = {name: compared.mean(name, 1.5, "e2e_mean_s") for name, _ in compared.policies}
    assert rows == sorted(means, key=means.__getitem__)
    text = " ".join(lines)
    for word in ("E2E s", "ratio", "oracle", "1.000 [1.000, 1.000]"):
        assert word in text


def test_saturation_table_shows_each_share(compared):
    result = dataclasses.replace(
        compared, saturation={"a": {0.9: 1.25, 0.99: 0.5}, "b": {0.9: 1.75, 0.99: 0.25}}
    )
    text = shown(saturation_table(result), 100)
    rows = [line.split() for line in text if line.split()[:1] in (["a"], ["b"])]
    assert rows == [["b", "1.75", "0.25"], ["a", "1.25", "0.50"]]


def test_goodput_scenarios_are_judged_by_goodput(make_scenario):
    scenario = make_scenario().model_copy(update={"objective": "goodput"})
    rules = [policy("random"), policy("speed-family"), policy("least-outstanding")]
    result = evaluate(scenario, rules, loads=(1.5,), num_seeds=3)
    ranked = [result.mean(name, 1.5, "goodput_rps") for name, _ in result.ranking(1.5)]
    assert ranked == sorted(ranked, reverse=True)
    best = result.best_heuristic(1.5)
    assert all(result.ratio(name, best, 1.5).value <= 1.0 for name, _ in result.policies)
    assert evaluation_document(result)["aggregates"][0]["ratio"]["metric"] == "goodput_rps"


def test_a_share_of_nothing_counts_in_differences():
    mine, other = np.array([0.5, 0.0, 1.0, np.nan]), np.array([0.0, 0.2, 0.7, 0.5])
    value, low, high, num_pairs = paired_difference(mine, other)
    assert (value, num_pairs) == (pytest.approx((0.5 - 0.2 + 0.3) / 3), 3)
    assert -0.21 < low < value < high < 0.51
    assert paired_difference(mine[:1], other[:1])[1:3] == (-np.inf, np.inf)
