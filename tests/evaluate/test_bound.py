"""The bound in comparisons: the row, shares of the headroom, tables, pages and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.cli import main
from servegym.cluster.outcome import latencies
from servegym.errors import ConfigError
from servegym.evaluate.compare import headroom_share
from servegym.evaluate.document import evaluation_document
from servegym.evaluate.harness import CLAIRVOYANT, evaluate
from servegym.evaluate.table import comparison_table
from servegym.problems.registry import problem_of

CROWDED = {
    "kind": "generated",
    "rate_rps": 150.0,
    "prompt": {"medians_tokens": [300.0], "max_tokens": 2000},
    "output": {"medians_tokens": [60.0], "sigmas": [0.8], "max_tokens": 300},
}


@pytest.fixture(scope="module", params=["latency", "tail", "goodput"])
def bounded(request, make_scenario):
    scenario = make_scenario(workload=CROWDED, objective=request.param)
    policies = [policy(name) for name in ("round-robin", "added-delay", "mct-oracle")]
    return evaluate(scenario, policies, num_seeds=3, num_units=80, bound_budget=80.0)


def test_share_of_headroom_is_what_one_computes_by_hand():
    found = headroom_share(np.array([9.0, 7.0]), np.array([10.0, 10.0]), np.array([8.0, 6.0]))
    assert found.value == pytest.approx(4.0 / 6.0)
    assert (found.low, found.high) == pytest.approx((0.5, 0.75))
    assert found.num_pairs == 2
    # goodput: more is better
    gained = headroom_share(np.array([12.0]), np.array([10.0]), np.array([14.0]), -1)
    assert gained.value == pytest.approx(0.5)
    assert np.isinf(gained.low)


def test_there_is_no_share_without_headroom():
    found = headroom_share(np.array([9.0]), np.array([10.0]), np.array([10.0]))
    assert np.isnan(found.value)


def test_tail_is_judged_and_tuned_by_the_99th_percentile_of_ttft(make_scenario):
    scenario = make_scenario(workload=CROWDED, objective="tail")
    problem = problem_of(scenario)
    assert problem.objective(scenario).metric == "ttft_p99_s"
    episodes = problem.episodes(scenario, [3], num_units=50)
    ttft_s, _, _ = latencies(episodes.run(policy("round-robin")).outcomes(0))
    assert episodes.losses(policy("round-robin"))[0] == np.percentile(ttft_s, 99)


def test_no_seed_has_a_policy_better_than_the_bound(bounded):
    sign, metric = bounded.objective.sign, bounded.objective.metric
    bound = sign * bounded.values(CLAIRVOYANT, 1.0, metric)
    assert len(bound) == 3
    for name in ("round-robin", "added-delay", "mct-oracle"):
        assert (bound <= sign * bounded.values(name, 1.0, metric) + 1e-12).all()


def test_best_rule_has_nothing_of_the_headroom_and_the_bound_all(bounded):
    assert bounded.headroom(bounded.best_heuristic(1.0), 1.0).value == 0.0
    assert bounded.headroom(CLAIRVOYANT, 1.0).value == 1.0
    assert bounded.best_heuristic(1.0) != CLAIRVOYANT
    assert bounded.ranking(1.0)[0] == (CLAIRVOYANT, "oracle")


def test_table_page_and_document_have_bound_and_shares(bounded):
    table = comparison_table(bounded, 1.0, 200)
    assert [str(c.header) for c in table.columns][-1] == "headroom %"
    assert next(iter(table.columns[0].cells)) == CLAIRVOYANT
    document = evaluation_document(bounded)
    assert document["bound"] == {"policy": CLAIRVOYANT, "budget_episodes": 80.0}
    shares = {a["policy"]: a["headroom"]["value"] for a in document["aggregates"]}
    assert shares[CLAIRVOYANT] == 1.0
    assert len(shares) == 4
    assert max(shares.values()) == 1.0
    assert CLAIRVOYANT not in document["decision_s"]


def test_page_says_what_the_bound_is(bounded, undrawn):
    from servegym.evaluate.report import report_page

    page = report_page(bounded)
    assert "<th>headroom %</th>" in page
    assert "knowing it brings at least so much" in page


def test_comparison_without_a_bound_is_as_before(compared):
    document = evaluation_document(compared)
    assert document["bound"] is None
    assert all(a["headroom"] is None for a in document["aggregates"])
    assert "headroom %" not in [str(c.header) for c in comparison_table(compared, 0.5, 200).columns]


def test_no_policy_may_have_the_name_of_the_bound(make_scenario):
    taken = policy("round-robin")
    taken.name = CLAIRVOYANT
    with pytest.raises(ConfigError, match="its own name"):
        evaluate(make_scenario(), [taken], num_seeds=1, bound_budget=1.0)


def test_command_prints_the_bound(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    main(
        "evaluate --scenario azure-conv-fit --policies added-delay round-robin --loads 1 --seeds 2"
        f" --num-requests 60 --bound --bound-budget 20 --json {path}".split()
    )
    assert CLAIRVOYANT in capsys.readouterr().out
    assert json.loads(path.read_text())["bound"]["budget_episodes"] == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bound --bound-budget -1", "must have a budget above 0 and finite, got"),
        ("--bound --bound-budget inf", "must have a budget above 0 and finite, got"),
        ("--bound-budget 5", "has no meaning without --bound"),
    ],
)
def test_a_budget_that_bounds_nothing_is_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        main(f"evaluate --scenario homogeneous-light --policies random {words}".split())
    assert message in capsys.readouterr().err
