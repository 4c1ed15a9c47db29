"""Rules by name: parameters, refusals, oracles, and one behaviour in both ways of running."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.baselines.registry import RULES, policy
from servegym.cluster.simulator import Simulator
from servegym.errors import ConfigError
from servegym.policy.contract import Group
from servegym.policy.policy import Heuristic, Policy
from servegym.policy.run import run
from servegym.scenario import parse_scenario

SCENARIO = parse_scenario(
    """
    name: small
    engine: {block_size: 64, max_num_seqs: 32}
    fleet:
      - {gpu: A100-SXM-80GB, count: 2, num_blocks: 400}
      - {gpu: L40S, count: 2, num_blocks: 200}
    workload:
      kind: generated
      rate_rps: 20.0
      prompt: {medians_tokens: [200.0], max_tokens: 2000}
      output: {medians_tokens: [100.0], max_tokens: 400}
      sessions: {mean_turns: 3.0, think_s: 2.0, system_prompt_tokens: 200}
    num_requests: 150
    """,
    "small",
)
#: The planner needs `tests/policy/test_what_if.py`'s kinder clusters.
DIRECT = [name for name in RULES.names() if not policy(name).needs & Group.WHAT_IF]
#: Those that learn are told of ended requests only if it is known that they do.
COMPILED = [name for name in DIRECT if isinstance(policy(name), Heuristic)]


def dispatched(rule: Policy, predicted: float | None = None) -> list[int]:
    episode = SCENARIO.episode(3)
    if predicted is not None:
        lengths = np.full(len(episode.table), predicted)
        episode = replace(episode, table=replace(episode.table, predicted_output_tokens=lengths))
    simulator = Simulator(SCENARIO.spec, [episode])
    run(simulator, rule, seed=1)
    return simulator.outcomes()["replica"].tolist()


class Delegate:
    """A policy that is no `Heuristic`, so that it runs batch by batch."""

    def __init__(self, rule):
        self.name, self.information, self.needs = rule.name, rule.information, rule.needs
        self.reset, self.act = rule.reset, rule.act


@pytest.mark.parametrize("name", RULES.names())
def test_every_name_makes_a_policy_that_describes_itself(name):
    rule = policy(name)
    assert isinstance(rule, Policy)
    assert rule.name == name
    assert rule.needs & Group.COUNTERS
    assert rule.param_names == tuple(part.partition("=")[0] for part in _shown(name))
    assert RULES.describe(name).text.endswith(".")


def _shown(name: str) -> list[str]:
    return [part for part in RULES.describe(name).parameters.split(", ") if part]


@pytest.mark.parametrize("name", RULES.names())
def test_the_default_parameters_can_be_written_out(name):
    text = f"{name}:{','.join(_shown(name))}"
    assert policy(text).params.tolist() == policy(name).params.tolist()


@pytest.mark.parametrize("name", COMPILED)
def test_rule_dispatches_alike_in_compiled_and_in_python_loops(name):
    compiled = dispatched(policy(name))
    assert compiled == dispatched(Delegate(policy(name)))
    assert len(set(compiled)) > 1


@pytest.mark.parametrize("name", DIRECT)
def test_rule_dispatches_alike_when_run_twice(name):
    rule = policy(name)
    assert dispatched(rule) == dispatched(rule)


@pytest.mark.parametrize(
    ("text", "params"),
    [
        ("speed-family:eta=0.5", [0.5]),
        ("prefix-load:eta=0.5", [0.05, 0.5]),
        ("llm-d:prefix=1,queue=4", [4.0, 2.0, 1.0, 0.0, 0.0, 0.0, 128.0, 0.0, 1.0, 0.0]),
        ("dynamo:per_request=1e-2", [1.0, 1.0, 0.01, 64.0]),
    ],
)
def test_parameters_are_read_from_the_name(text, params):
    rule = policy(text)
    assert rule.params.tolist() == params
    assert rule.name == text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("least-outstandin", ["'least-outstandin'", "round-robin", "mean least-outstanding"]),
        ("", ["''", "least-outstanding"]),
        ("llm-d-oracle", ["'llm-d-oracle'", "mct-oracle"]),
        ("speed-family:beta=1", ["speed-family", "'beta'", "eta"]),
        ("dynamo:overlapp=1", ["dynamo", "'overlapp'", "prefill_scale", "mean overlap"]),
        ("random:eta=1", ["random", "no parameters", "'eta'"]),
        ("speed-family:eta=fast", ["eta", "number", "'fast'"]),
        ("speed-family:eta", ["eta", "number"]),
    ],
)
def test_an_unknown_name_parameter_or_value_is_refused_in_one_sentence(text, parts):
    with pytest.raises(ConfigError) as error:
        policy(text)
    message = str(error.value)
    assert all(part in message or part in message.replace("'", "") for part in parts)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "parameter"),
    [
        ("speed-family:eta=nan", "eta"),
        ("speed-family:eta=inf", "eta"),
        ("dynamo:block_tokens=0", "block_tokens"),
        ("hexgen:alpha=2", "alpha"),
        ("llm-d:kv=-1", "kv"),
        ("llm-d:load_threshold=0", "load_threshold"),
        ("sglang:cache_threshold=-3", "cache_threshold"),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_sentence(text, parameter):
    with pytest.raises(ConfigError, match=f"{parameter}.* must be"):
        policy(text)


def test_tuning_ranges_belong_to_parameters_of_rules():
    assert RULES.tunable()
    for name, ranges in RULES.tunable().items():
        assert set(ranges) <= set(policy(name).param_names)
        for key, (low, high, logarithmic) in ranges.items():
            assert low < high
            assert low > 0 or not logarithmic
            assert policy(f"{name}:{key}={low}") is not None


@pytest.mark.parametrize("name", [n for n in DIRECT if policy(n).information == "predictive"])
def test_predictions_decide_what_a_predictive_rule_does(name):
    assert dispatched(policy(name)) != dispatched(policy(name), predicted=5.0)


@pytest.mark.parametrize("name", [n for n in DIRECT if n.endswith("-oracle")])
def test_an_oracle_sees_the_true_lengths_whatever_is_predicted(name):
    assert policy(name).information == "oracle"
    assert dispatched(policy(name)) == dispatched(policy(name), predicted=5.0)
    assert dispatched(policy(name)) != dispatched(policy(name.removesuffix("-oracle")))


def test_every_oracle_is_a_predictive_rule_that_is_told_the_truth():
    oracles = [name for name in RULES.names() if policy(name).information == "oracle"]
    assert oracles == [name for name in RULES.names() if name.endswith("-oracle")]
    assert all(policy(o.removesuffix("-oracle")).information == "predictive" for o in oracles)
