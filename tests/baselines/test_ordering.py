"""What each order does in situations small enough to be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.baselines.ordering.registry import RULES, ordering_policy
from servegym.errors import ConfigError
from servegym.policy.ordering import (
    NO_LIMIT_S,
    NUM_ORDERING_FEATURES,
    ORDERING_FEATURES,
    OrderingFeature,
    OrderingPolicy,
    prefill_left_s,
    remaining_s,
)

#: A waiting request in an engine whose steps take 0.1 s.
USUAL = {
    "prompt_tokens": 100.0,
    "predicted_remaining_tokens": 50.0,
    "ttft_slack_s": NO_LIMIT_S,
    "deadline_slack_s": NO_LIMIT_S,
    "step_s": 0.1,
    "max_num_batched_tokens": 64.0,
}


def table(*rows):
    features = np.zeros((len(rows), NUM_ORDERING_FEATURES))
    for i, row in enumerate(rows):
        for name, value in {**USUAL, **row}.items():
            features[i, OrderingFeature[name.upper()]] = value
    return features


def scores(text, *rows):
    policy = ordering_policy(text)
    return policy.score(table(*rows), np.zeros((len(rows), policy.memory_size))).tolist()


def admitted(text, *rows):
    """Places of waiting requests, the first to be admitted first."""
    return np.argsort(scores(text, *rows), kind="stable").tolist()


def first_victim(text, *rows):
    return int(np.argmax(scores(text, *({"is_running": 1, **row} for row in rows))))


def running(**row):
    return {"is_running": 1.0, "computed_tokens": 100.0, **row}


def test_prefill_takes_as_many_steps_as_budgets():
    # 100 tokens at 64 a step; 50 predicted tokens, the first comes with the second step
    features = table({}, running(generated_tokens=10, computed_tokens=109))
    assert prefill_left_s(features).tolist() == pytest.approx([0.2, 0.1])
    assert remaining_s(features).tolist() == pytest.approx([0.2 + 4.9, 0.1 + 4.9])


def test_fcfs_admits_the_earliest_and_preempts_the_latest():
    rows = ({"waited_s": 1}, {"waited_s": 3}, {"waited_s": 2})
    assert admitted("fcfs", *rows) == [1, 2, 0]
    assert first_victim("fcfs", *rows) == 0


def test_priority_admits_the_lowest_number_and_preempts_the_highest():
    rows = ({"client_priority": 2}, {"client_priority": -1}, {"client_priority": 5})
    assert admitted("priority", *rows) == [1, 0, 2]
    assert first_victim("priority", *rows) == 2


def test_edf_goes_by_whichever_limit_is_due_first():
    rows = ({"ttft_slack_s": 3}, {"deadline_slack_s": 2}, {"ttft_slack_s": 1}, {})
    assert admitted("edf", *rows) == [2, 1, 0, 3]
    assert first_victim("edf", *rows) == 3


def test_edf_may_put_hopeless_requests_last():
    # 0.2 s to the first token
    rows = ({"ttft_slack_s": 0.1}, {"ttft_slack_s": 0.3})
    assert admitted("edf", *rows) == [0, 1]
    assert admitted("edf:hopeless_last=1", *rows) == [1, 0]
    assert ordering_policy("edf").information == "blind"
    assert ordering_policy("edf:hopeless_last=1").information == "predictive"


def test_least_slack_takes_off_the_time_that_is_needed():
    # 5.1 s are needed of 6, then 1.2 of 3: slack 0.9 and 1.8
    rows = (
        {"deadline_slack_s": 3.0, "predicted_remaining_tokens": 11},
        {"deadline_slack_s": 6.0},
    )
    assert admitted("edf", *rows) == [0, 1]
    assert admitted("least-slack", *rows) == [1, 0]
    assert scores("least-slack", *rows) == pytest.approx([1.8, 0.9])
    assert admitted("least-slack:hopeless_last=1", {"deadline_slack_s": 5.0}, *rows) == [2, 1, 0]


def test_sjf_goes_by_whole_length_and_preempts_as_fcfs():
    rows = (
        {"generated_tokens": 40, "predicted_remaining_tokens": 10, "waited_s": 9},
        {"predicted_remaining_tokens": 30, "waited_s": 1},
    )
    assert admitted("sjf", *rows) == [1, 0]
    assert first_victim("sjf", *rows) == 1


def test_srpt_goes_by_what_is_left():
    rows = (
        {"generated_tokens": 40, "predicted_remaining_tokens": 10},
        {"predicted_remaining_tokens": 30},
    )
    assert admitted("srpt", *rows) == [0, 1]
    assert first_victim("srpt", *rows) == 1


def test_footprint_weighs_tokens_left_with_the_kv_they_hold():
    # 50 left of 100 prompt tokens hold 125 on average, 20 left of 900 hold 910
    rows = ({}, {"prompt_tokens": 900.0, "predicted_remaining_tokens": 20})
    assert scores("footprint", *rows) == [50 * 125, 20 * 910]
    assert admitted("footprint", *rows) == [0, 1]
    assert admitted("footprint:weight=0", *rows) == admitted("srpt", *rows) == [1, 0]
    assert first_victim("footprint", *rows) == 1
    assert first_victim("footprint:victim_weight=0", *rows) == 0


def test_trail_spares_those_that_are_nearly_done():
    # 160 of 200 predicted tokens are 0.8 of them
    rows = (
        {"generated_tokens": 160, "predicted_remaining_tokens": 40},
        {"generated_tokens": 10, "predicted_remaining_tokens": 20},
    )
    assert first_victim("srpt", *rows) == 0
    assert first_victim("trail", *rows) == 1
    assert first_victim("trail:young=0.9", *rows) == 0
    assert admitted("trail", *rows) == [1, 0]


def test_ltr_boosts_a_starved_request_for_a_period():
    policy = ordering_policy("ltr:starvation=3,period=2")
    memory = np.zeros((2, policy.memory_size))
    long, short = {"predicted_remaining_tokens": 90}, {"predicted_remaining_tokens": 5}
    alone = [policy.score(table(long), memory[:1])[0] for _ in range(2)]
    assert alone == [90, 90]
    # in its third idle step the long one goes before a newcomer
    assert np.argmin(policy.score(table(long, short), memory)) == 0
    busy = table(running(**long), running(**short))
    victims = [int(np.argmax(policy.score(busy, memory))) for _ in range(3)]
    # it keeps that place until it has run for two steps
    assert victims == [1, 0, 0]


def test_mlfq_demotes_by_attained_service_and_joins_by_prompt():
    policy = ordering_policy("mlfq:quantum_s=0.1875,growth=2,starvation_s=3")
    memory = np.zeros((2, policy.memory_size))
    step = {"step_s": 0.125}
    # 100 prompt tokens need 0.25 s: above the first quantum, within the second of 0.375
    rows = ({"prompt_tokens": 10, "waited_s": 1, **step}, {"waited_s": 2, **step})
    assert np.argmin(policy.score(table(*rows), memory)) == 0
    assert memory[:, 1].tolist() == [0, 1]
    busy = (running(prompt_tokens=10, **step), running(**step))
    levels = []
    for _ in range(4):
        policy.score(table(*busy), memory)
        levels.append(memory[:, 1].tolist())
    # 0.125 s a step: level 0 is left after two of them, level 1 after four
    assert levels == [[0, 1], [1, 1], [1, 1], [1, 2]]
    starved = ({"prompt_tokens": 10, "idle_s": 3.0, **step}, {"idle_s": 2.9, **step})
    policy.score(table(*starved), memory)
    assert memory[:, 1].tolist() == [0, 2]


def test_random_draws_once_a_request():
    policy = ordering_policy("random:seed=4")
    memory = np.zeros((50, 1))
    first = policy.score(table(*[{}] * 50), memory)
    assert policy.score(table(*[{}] * 50), memory).tolist() == first.tolist()
    assert len(set(first.tolist())) == 50
    again = ordering_policy("random:seed=4")
    assert again.score(table(*[{}] * 50), np.zeros((50, 1))).tolist() == first.tolist()


@st.composite
def some_features(draw):
    n = draw(st.integers(1, 8))
    columns = [
        draw(st.lists(st.floats(max(f.low, -1e4), min(f.high, 1e4)), min_size=n, max_size=n))
        for f in ORDERING_FEATURES
    ]
    features = np.array(columns).T
    features[:, 0] = np.round(features[:, 0])
    return features


@given(features=some_features(), text=st.sampled_from(RULES.names()))
def test_every_order_scores_whatever_an_engine_may_report(features, text):
    policy = ordering_policy(text)
    assert isinstance(policy, OrderingPolicy)
    memory = np.zeros((len(features), policy.memory_size))
    given_features = features.copy()
    for _ in range(3):
        got = policy.score(features, memory)
        assert got.shape == (len(features),)
        assert got.dtype == np.float64
        assert np.isfinite(got).all()
        assert np.isfinite(memory).all()
    assert (features == given_features).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sprt", "unknown order 'sprt'.*did you mean srpt"),
        ("ltr:starve=3", "unknown parameter of ltr 'starve'.*starvation"),
        ("ltr:period=0", "parameter period of ltr must be a number from 1 to"),
        ("srpt:x=1", "srpt has no parameters, got 'x'"),
        ("trail:young=2", "must be a number from 0 to 1, got '2'"),
        ("trail:young=0.5,young=0.6", "must be given once"),
    ],
)
def test_an_unknown_order_or_parameter_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        ordering_policy(text)


def test_every_order_says_what_it_is():
    for name in RULES.names():
        policy = ordering_policy(name)
        assert policy.name == name
        assert len(policy.param_names) == len(policy.params)
