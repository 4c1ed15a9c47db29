"""Closed-form scores: the compiled program, rules as scores, files and the live runtime."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest

from servegym.baselines.registry import policy
from servegym.baselines.score import RULES_AS_SCORES, _evaluate, program_of, score_policy
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError, ExportError
from servegym.export.manifest import NAME
from servegym.export.resolve import resolve_policy
from servegym.export.score import sample_rows, save_score
from servegym.policy.contract import (
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    UP,
    Group,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.expression import NUMBER, REPLICA_FIELDS, Expression, parse
from servegym.policy.policy import Observations
from servegym.policy.run import run
from servegym.problems.registry import find_problem
from servegym.scenario import load_scenario
from servegym.serve.dispatcher import DispatchConfig, Dispatcher
from servegym.serve.facts import Rates, fleet_facts
from servegym.serve.guards import Reason
from servegym.serve.runtime import PolicyRuntime, RuntimeConfig
from servegym.train.evolution import drawn


def worked_out(x: Expression, replicas, request, allowed):
    """A plain reference: all replicas at once, one operation after the other."""
    if x.name == NUMBER:
        return np.full(len(allowed), x.value)
    if x.name in REPLICA_FIELDS:
        return replicas[ReplicaFeature[x.name.upper()]].copy()
    if not x.parts:
        return np.full(len(allowed), request[RequestFeature[x.name.upper()]])
    a, b, c = ([worked_out(part, replicas, request, allowed) for part in x.parts] * 3)[:3]
    among = a[allowed]
    whole = np.ones(len(allowed))
    return {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "<": lambda: (a < b) * whole,
        "<=": lambda: (a <= b) * whole,
        ">": lambda: (a > b) * whole,
        ">=": lambda: (a >= b) * whole,
        "negative": lambda: -a,
        "abs": lambda: np.abs(a),
        "sqrt": lambda: np.sqrt(a),
        "log": lambda: np.log(a),
        "exp": lambda: np.exp(a),
        "lowest": lambda: among.min() * whole,
        "highest": lambda: among.max() * whole,
        "mean": lambda: among.mean() * whole,
        "min": lambda: np.where(b < a, b, a),
        "max": lambda: np.where(b > a, b, a),
        "pow": lambda: np.power(a, b),
        "where": lambda: np.where(a > 0.0, b, c),
    }[x.name]()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_compiled_program_works_out_what_plain_arrays_do():
    rng = np.random.default_rng(5)
    compared = 0
    for _ in range(300):
        width = int(rng.integers(1, 6))
        replicas = np.exp(rng.normal(0.0, 2.0, (len(REPLICA_FEATURES), width)))
        replicas[rng.random(replicas.shape) < 0.2] = 0.0
        request = np.exp(rng.normal(0.0, 2.0, len(REQUEST_FEATURES)))
        allowed = rng.random(width) < 0.7
        allowed[rng.integers(width)] = True
        expression = drawn(rng, levels=5)
        wanted = worked_out(expression, replicas, request, allowed)
        program = program_of(expression)
        stack = np.empty((int(program[0]), width))
        _evaluate(program, replicas, request, allowed, stack)
        # a minimum over what is no number depends on the order in which one looks
        if np.isfinite(wanted).all():
            np.testing.assert_allclose(stack[0], wanted, rtol=1e-12)
            compared += 1
            mask = np.append(allowed, [False, False])
            chosen = score_policy(expression)
            chosen.reset(1, 0)
            seen = Observations(replicas[None], request[None], mask[None])
            action = int(chosen.act(seen, np.zeros(1, np.int64))[0])
            best = wanted[allowed].min()
            assert allowed[action]
            assert math.isclose(wanted[action], best, rel_tol=1e-12, abs_tol=1e-300)
    assert compared > 100


@pytest.mark.parametrize("scenario", ["mixed-chat", "failures"])
def test_a_rule_as_a_score_decides_as_the_rule_does(scenario):
    scenario = load_scenario(scenario)
    episodes = [scenario.episode(seed, num_requests=250) for seed in range(2)]
    decisions = set()
    for name, text in RULES_AS_SCORES.items():
        rule, score = policy(name), score_policy(text)
        assert (score.needs, score.information) == (rule.needs, rule.information)
        played = []
        for chosen in (rule, score):
            simulator = Simulator(scenario.spec, episodes)
            run(simulator, chosen)
            played.append([simulator.outcomes(env) for env in range(2)])
        for ours, theirs in zip(*played, strict=True):
            for column in ("replica", "finish_s"):
                np.testing.assert_array_equal(ours[column], theirs[column])
        decisions.add(played[0][0]["replica"].tobytes())
    assert len(decisions) > 6  # the rules are not all the same here


def seen(*outstanding: float) -> Observations:
    width = len(outstanding)
    replicas = np.ones((1, len(REPLICA_FEATURES), width))
    replicas[0, ReplicaFeature["OUTSTANDING_REQUESTS"]] = outstanding
    mask = np.ones((1, width + 2), bool)
    mask[:, width:] = False
    return Observations(replicas, np.ones((1, len(REQUEST_FEATURES))), mask)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("outstanding_requests", 1),
        ("-outstanding_requests", 2),
        ("log(outstanding_requests - 2)", 0),  # what is no number is the worst
        ("0 / 0", 0),
        ("1 / (outstanding_requests - 1)", 2),
        ("abs(outstanding_requests - mean(outstanding_requests))", 0),
        ("abs(outstanding_requests - highest(outstanding_requests))", 2),
        ("outstanding_requests - lowest(outstanding_requests) <= 0", 0),
        ("where(outstanding_requests > 4, -1, 1)", 2),
    ],
)
def test_the_lowest_score_is_chosen(text, action):
    score = score_policy(text)
    score.reset(1, 0)
    assert score.act(seen(3.0, 1.0, 5.0), np.zeros(1, np.int64)).tolist() == [action]


def test_what_no_replica_may_have_is_held_or_rejected():
    observations = seen(3.0, 1.0)
    score = score_policy("mean(outstanding_requests)")
    score.reset(1, 0)
    for mask, action in (([0, 0, 1, 1], 2), ([0, 0, 0, 1], 3), ([1, 0, 1, 1], 0)):
        shown = observations._replace(mask=np.array([mask], bool))
        assert score.act(shown, np.zeros(1, np.int64)).tolist() == [action]


def test_a_score_asks_for_what_it_reads_and_says_what_it_knows():
    assert score_policy("outstanding_requests").information == "blind"
    assert score_policy("relative_speed").information == "metric"
    assert score_policy("step_time_ratio").information == "metric"
    assert score_policy("predicted_output_tokens").information == "predictive"
    assert score_policy("expected_tokens").needs == Group.COUNTERS | Group.LENGTHS
    assert find_problem("dispatch").is_learned(score_policy("up"))
    assert not find_problem("dispatch").is_learned(policy("added-delay"))


@pytest.fixture
def saved(tmp_path):
    scenario = load_scenario("mixed-chat")
    score = score_policy("(outstanding_requests + step_time_ratio) / relative_speed")
    rows = sample_rows(score, scenario.spec, [scenario.episode(0, num_requests=60)])
    assert rows["replicas"].shape[1] == 30
    assert rows["replicas"][:, UP].min() == 1.0
    return save_score(score, tmp_path / "mine", rows, scenario="mixed-chat")


def test_a_score_is_a_policy_wherever_one_is_named(saved):
    found = resolve_policy(str(saved))
    assert (found.name, found.information) == ("mine", "metric")
    live = PolicyRuntime(RuntimeConfig(policy=str(saved), fallback="random"))
    assert live.loaded is not None
    assert live.loaded.ranges is not None
    with pytest.raises(ConfigError, match="the fallback must be a rule by name"):
        PolicyRuntime(RuntimeConfig(policy="random", fallback=str(saved)))


def test_a_live_router_decides_by_a_score(saved):
    rates = [Rates(prefill_tokens_per_s=9_000, decode_step_s=0.01)] * 2
    config = DispatchConfig(runtime=RuntimeConfig(policy=str(saved), max_features_out=99))
    dispatcher = Dispatcher(config, ["a", "b"], fleet_facts(rates))
    chosen = []
    for key in ("1", "2", "3", "4"):
        decision = dispatcher.decide(dispatcher.arrive("hello", key=key))
        assert decision.reason == Reason.POLICY
        chosen.append(decision.action)
    assert sorted(chosen) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no json", "cannot be read as a score"),
        ("[" * 100_000, "cannot be read as a score"),
        ('{"score": 3}', "must be {"),
        ('{"score": "up", "more": 1}', "must be {"),
        ('{"score": "speed"}', "unknown feature or function of a score"),
    ],
)
def test_a_broken_score_file_is_refused(saved, content, said):
    saved.write_text(content)
    manifest = json.loads((saved.parent / NAME).read_text())
    with pytest.raises(ExportError, match="is not the file its manifest was written for"):
        resolve_policy(str(saved))
    manifest["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    (saved.parent / NAME).write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=said):
        resolve_policy(str(saved))


def test_a_score_needs_its_manifest(tmp_path):
    (tmp_path / "score.json").write_text('{"score": "up"}')
    with pytest.raises(ExportError, match="must exist with a manifest"):
        resolve_policy(str(tmp_path / "score.json"))


def test_a_score_that_reads_more_than_its_manifest_says_is_refused(tmp_path):
    rows = {"replicas": np.ones((3, 21)), "request": np.ones((3, 9))}
    path = save_score(score_policy("up"), tmp_path, rows)
    text = json.dumps({"score": "step_time_ratio"})
    manifest = json.loads((tmp_path / NAME).read_text())
    path.write_text(text)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / NAME).write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="reads what is inferred"):
        resolve_policy(str(path))


def test_texts_of_rules_are_written_as_they_are_read():
    assert len(RULES_AS_SCORES) >= 10
    for text in RULES_AS_SCORES.values():
        assert parse(str(parse(text))) == parse(text)
