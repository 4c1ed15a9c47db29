"""A fleet of engines that go by priorities: dispatch and order decided together."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from servegym.baselines.ordering.registry import ordering_policy
from servegym.baselines.registry import policy
from servegym.cli import main
from servegym.errors import ConfigError, PolicyError
from servegym.evaluate.harness import evaluate
from servegym.evaluate.tune import candidates, tune
from servegym.export.resolve import resolve_dispatch
from servegym.policy.ordering import OrderingRule
from servegym.policy.pair import Pair
from servegym.policy.run_ordering import make_simulator as make_ordered
from servegym.policy.run_ordering import run_ordering
from servegym.policy.run_pair import make_simulator, run_pair
from servegym.problems.dispatch import Dispatch
from servegym.scenario import Scenario, load_scenario

ENGINE = {"gpu": "L4", "num_blocks": 120, "engine": "vllm-priority"}
FLEET = {
    "name": "tight fleet",
    "engine": {"block_size": 16, "max_num_seqs": 8, "prefix_caching": False},
    "fleet": [{**ENGINE, "count": 3}],
    "workload": {
        "kind": "generated",
        "rate_rps": 4.0,
        "prompt": {"medians_tokens": [200.0], "max_tokens": 800},
        "output": {"medians_tokens": [150.0], "max_tokens": 600},
    },
    "slo_classes": [
        {"name": "first", "ttft_s": 1.0, "tpot_s": 0.1},
        {"name": "second", "ttft_s": 9.0, "tpot_s": 0.5},
    ],
    "num_requests": 90,
}


def fleet(**changes) -> Scenario:
    return Scenario.model_validate({**FLEET, **changes})


def played(scenario: Scenario, pair: Pair, seeds=(0, 1)):
    simulator = make_simulator(scenario.spec, [scenario.episode(s) for s in seeds], pair)
    run_pair(simulator, pair)
    return simulator


def same_fate(got, want) -> None:
    for env in range(got.num_envs):
        a, b = got.outcomes(env), want.outcomes(env)
        for column in a.dtype.names:
            # asking may end a stretch of decode steps early, which rounds its times anew
            np.testing.assert_allclose(a[column], b[column], rtol=1e-12, err_msg=column)


@pytest.mark.parametrize("dispatch", ["least-work-left", "random", "round-robin"])
def test_an_order_by_class_is_what_engines_do_unless_they_are_told(dispatch):
    scenario = fleet()
    by_class = Pair(policy(dispatch), ordering_policy("priority"), "pair")
    got = played(scenario, by_class)
    want = Dispatch().episodes(scenario, [0, 1]).run(policy(dispatch))
    same_fate(got, want)
    assert got.outcomes(0)["num_preemptions"].sum() > 0


@pytest.mark.parametrize("order", ["srpt", "mlfq", "ltr", "footprint-oracle"])
def test_a_fleet_of_one_is_an_engine(order):
    scenario = fleet(fleet=[ENGINE], workload={**FLEET["workload"], "rate_rps": 1.3})
    rule = ordering_policy(order)
    got = played(scenario, resolve_dispatch(f"round-robin+{order}"))
    want = make_ordered(scenario.spec, [scenario.episode(s) for s in (0, 1)], rule)
    run_ordering(want, rule)
    same_fate(got, want)
    assert got.outcomes(0)["num_preemptions"].sum() > 0


class Interpreted:
    """A dispatch rule that is asked batch by batch, as networks are."""

    def __init__(self, rule):
        self.name, self.information, self.needs = rule.name, rule.information, rule.needs
        self.reset, self.act = rule.reset, rule.act


def test_rules_in_compiled_code_and_policies_asked_from_outside_are_played_alike():
    scenario = fleet()
    rule, order = policy("least-work-left"), ordering_policy("srpt")
    inside = played(scenario, Pair(rule, order, "inside"))
    same_fate(played(scenario, Pair(Interpreted(rule), order, "outside")), inside)
    assert len(set(inside.outcomes(0)["replica"])) == 3


def test_a_planner_looks_ahead_under_the_engines_own_order():
    # what it foresees must not stop to ask for an order
    scenario = fleet(num_requests=40)
    pair = resolve_dispatch("what-if-added+srpt")
    done = played(scenario, pair, seeds=(3,)).outcomes()
    assert np.isfinite(done["finish_s"]).all()
    assert set(done["replica"]) == {0, 1, 2}


def test_who_knows_more_names_the_information():
    assert resolve_dispatch("random+fcfs").information == "blind"
    assert resolve_dispatch("random+srpt").information == "predictive"
    assert resolve_dispatch("llm-d+fcfs").information == "metric"
    assert resolve_dispatch("mct-oracle+fcfs").information == "oracle"


def test_an_oracle_tells_both_the_truth():
    scenario = fleet()
    simulator = played(scenario, resolve_dispatch("random+srpt-oracle"), seeds=(0,))
    request = simulator.state.request[0]
    np.testing.assert_array_equal(request["predicted"], request["output"])


def test_what_a_pair_may_not_do_is_refused():
    for wrong, message in (
        (
            "added-delay+round-robin",
            "unknown order, placement, migration or retention 'round-robin': .*least-tpot.*srpt",
        ),
        ("fcfs+added-delay", "unknown policy 'fcfs'"),
        (
            "a+b+c",
            r"DISPATCH\+PLACEMENT, DISPATCH\+MIGRATION or DISPATCH\+RETENTION, got 'a",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_dispatch(wrong)
    other = fleet(fleet=[{**ENGINE, "engine": "vllm"}, ENGINE])
    with pytest.raises(
        ConfigError, match=r"entries all have engine: vllm-priority, got vllm, vllm-p"
    ):
        played(other, resolve_dispatch("random+fcfs"))


def test_a_dispatch_or_an_order_out_of_bounds_is_refused():
    nowhere = Interpreted(policy("random"))
    nowhere.act = lambda observations, envs: np.full(len(envs), 4)
    with pytest.raises(
        PolicyError, match=r"random chose 4 in environment 0: allowed are \[0, 1, 2\]"
    ):
        played(fleet(), Pair(nowhere, ordering_policy("srpt"), "x"))
    odd = OrderingRule("odd", "blind", lambda features, memory, params: features[:, 0] * np.nan)
    with pytest.raises(PolicyError, match="odd must give"):
        played(fleet(), Pair(policy("random"), odd, "x"))


def test_pairs_are_evaluated_and_tuned():
    scenario, problem = fleet(num_requests=60), Dispatch()
    texts = candidates(problem.parts("added-delay+footprint"), 6)
    assert texts[0] == "added-delay+footprint"
    assert len(set(texts)) == 6
    made = [resolve_dispatch(text) for text in texts]
    assert all(len(pair.dispatch.params) and len(pair.order.params) for pair in made)
    assert candidates(problem.parts("round-robin+footprint"), 2)[1].startswith("round-robin+foot")
    with pytest.raises(ConfigError, match="unknown tunable policy 'round-robin'"):
        candidates(problem.parts("round-robin+srpt"), 2)
    with pytest.raises(ConfigError, match="unknown order 'srp'"):
        candidates(problem.parts("added-delay+srp"), 2)
    found = tune(problem, scenario, "added-delay+footprint", [1.5], budget=3, num_seeds=2)
    assert found.text in texts[:3] or found.text.startswith("added-delay:")
    pairs = [resolve_dispatch(t) for t in ("random+fcfs", "added-delay+srpt", "added-delay")]
    result = evaluate(scenario, pairs, loads=[1.5], num_seeds=3)
    assert next(name for name, _ in result.ranking(1.5)) == "added-delay+srpt"
    assert result.learned == []
    assert np.isfinite(result.decision_s["added-delay+srpt"]).all()


def test_bundled_fleets_are_four_times_their_engine(capsys):
    for name in ("kv-starved", "slo-tiers"):
        one, four = load_scenario(name), load_scenario(f"{name}-fleet")
        assert four.max_replicas == 4
        assert four.fleet == tuple(e.model_copy(update={"count": 4}) for e in one.fleet)
        assert four.workload == one.workload.model_copy(
            update={"rate_rps": 4 * one.workload.rate_rps}
        )
        assert Dispatch().owns(four)
    options = (
        "--loads 1.2 --seeds 1 --num-requests 200 --policies added-delay+footprint random+fcfs"
    )
    main(["evaluate", "--scenario", "kv-starved-fleet", *options.split()])
    assert "added-delay+footprint" in capsys.readouterr().out


def test_without_policies_a_fleet_that_takes_orders_is_shown_what_they_bring(tmp_path, capsys):
    path, report = tmp_path / "fleet.yaml", tmp_path / "report.html"
    path.write_text(yaml.safe_dump({**FLEET, "num_requests": 40}))
    main(["evaluate", "--scenario", str(path), "--loads", "1.5", "--seeds", "2",
          "--report", str(report)])  # fmt: skip
    shown, page = capsys.readouterr().out, report.read_text()
    pairs = Dispatch().compared(load_scenario(str(path)))
    assert {"least-outstanding+fcfs", "least-outstanding+footprint"} < set(pairs)
    for name in pairs:
        assert isinstance(resolve_dispatch(name), Pair)
        assert name in shown
        assert name in page
    assert Dispatch().compared(load_scenario("mixed-chat")) == Dispatch().default_policies
