"""Features kept from step to step against features made anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.policy.ordering import NO_LIMIT_S, NUM_ORDERING_FEATURES, OrderingFeature
from servegym.serve.vllm.config import PluginConfig
from servegym.serve.vllm.hints import E2E_SLO_S, PREDICTED_OUTPUT_TOKENS, TTFT_SLO_S
from servegym.serve.vllm.orderer import InvalidScores, Orderer
from servegym.serve.vllm.rows import RequestRows

from .fake_engine import FakeRequest, FakeScheduler


def make_rows(capacity=256, **settings):
    return RequestRows(
        PluginConfig(**settings),
        block_size=4,
        max_num_batched_tokens=16,
        memory_size=0,
        capacity=capacity,
    )


def read(rows, waiting, running, now_s=10.0, usage=0.5, step_s=0.1):
    _, features, arrival_s = rows.read(waiting, running, now_s, kv_cache_usage=usage, step_s=step_s)
    assert arrival_s.tolist() == [r.arrival_time for r in (*waiting, *running)]
    return features


def column(features, name):
    return features[:, OrderingFeature[name.upper()]].tolist()


def naive(request, is_running, idle_since_s, priority, now_s):
    """A row from a request alone."""
    told = request.extra_args or {}
    left = request.arrival_time + told.get(TTFT_SLO_S, math.inf) - now_s
    deadline = request.arrival_time + told.get(E2E_SLO_S, math.inf) - now_s
    return {
        "is_running": float(is_running),
        "client_priority": priority,
        "prompt_tokens": request.num_prompt_tokens,
        "computed_tokens": request.num_computed_tokens,
        "generated_tokens": request.num_output_tokens,
        "predicted_remaining_tokens": max(
            told.get(PREDICTED_OUTPUT_TOKENS, request.max_tokens) - request.num_output_tokens, 1
        ),
        "waited_s": now_s - request.arrival_time,
        "idle_s": 0.0 if is_running else now_s - idle_since_s,
        "kv_blocks": math.ceil(request.num_computed_tokens / 4),
        "num_preemptions": request.num_preemptions,
        "ttft_slack_s": NO_LIMIT_S if request.num_output_tokens else min(left, NO_LIMIT_S),
        "deadline_slack_s": min(deadline, NO_LIMIT_S),
    }


@given(
    drawn=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.integers(1, 12),
            st.integers(-3, 3),
            st.sampled_from([None, 0.5, 7.0]),
            st.sampled_from([None, 2.0]),
        ),
        min_size=1,
        max_size=30,
    ),
    seed=st.integers(0, 9),
)
def test_rows_equal_what_the_requests_say(drawn, seed):
    """An engine short of blocks under random priorities: requests come, go and are preempted."""
    rng = np.random.default_rng(seed)
    scheduler = FakeScheduler(None, num_blocks=8)
    rows = make_rows(capacity=2, predict="max_tokens")
    priorities, preemptions, idle_since_s = {}, {}, {}
    step = 0
    while scheduler.requests or step < len(drawn):
        now_s = 100.0 + step
        if step < len(drawn):
            prompt, output, priority, ttft_slo_s, e2e_slo_s = drawn[step]
            told = {TTFT_SLO_S: ttft_slo_s, E2E_SLO_S: e2e_slo_s}
            told = {name: value for name, value in told.items() if value}
            name = str(step)
            scheduler.add_request(FakeRequest(name, now_s, prompt, output, priority, told))
            priorities[name], idle_since_s[name], preemptions[name] = priority, now_s, 0
        waiting, running = list(scheduler.waiting._heap), scheduler.running
        for request in waiting:
            if request.num_preemptions != preemptions[request.request_id]:
                preemptions[request.request_id] = request.num_preemptions
                idle_since_s[request.request_id] = now_s
        rows.forget_ended(scheduler.requests)
        assert len(rows) <= len(scheduler.requests)
        features = read(rows, waiting, running, now_s, usage=0.25, step_s=0.5)
        for i, request in enumerate([*waiting, *running]):
            name = request.request_id
            wanted = naive(request, i >= len(waiting), idle_since_s[name], priorities[name], now_s)
            wanted |= {
                "num_running": len(running),
                "num_waiting": len(waiting),
                "kv_cache_usage": 0.25,
                "step_s": 0.5,
                "max_num_batched_tokens": 16,
            }
            got = dict(zip([f.name.lower() for f in OrderingFeature], features[i], strict=True))
            assert got == wanted
            request.priority = int(rng.integers(0, 1000))
        scheduler.waiting._heap.sort()
        scheduler.step()
        step += 1


def test_a_request_without_a_prediction_is_taken_for_an_average_one():
    rows = make_rows()
    first = FakeRequest("a", max_tokens=100)
    assert column(read(rows, [first], []), "predicted_remaining_tokens") == [100]
    first.num_output_tokens = 20
    rows.forget_ended({})
    # the first to end sets the average, but nobody is taken to exceed its own limit
    requests = [FakeRequest("b", max_tokens=100), FakeRequest("c", max_tokens=7)]
    assert column(read(rows, requests, []), "predicted_remaining_tokens") == [20, 7]
    requests[0].num_output_tokens = 120
    rows.forget_ended({"c": requests[1]})
    # 20 + 0.02 (120 - 20)
    later = FakeRequest("d", max_tokens=100)
    assert column(read(rows, [later], []), "predicted_remaining_tokens") == pytest.approx([22])


@pytest.mark.parametrize("bad", ["many", -3, 0, math.nan, math.inf, True, None, [3]])
def test_a_bad_hint_is_taken_for_absent(bad):
    rows = make_rows(predict="max_tokens")
    request = FakeRequest("a", max_tokens=9, extra_args={PREDICTED_OUTPUT_TOKENS: bad})
    assert column(read(rows, [request], []), "predicted_remaining_tokens") == [9]


def test_a_hint_above_the_requests_own_limit_is_cut():
    rows = make_rows()
    request = FakeRequest("a", max_tokens=9, extra_args={PREDICTED_OUTPUT_TOKENS: 1e9})
    assert column(read(rows, [request], []), "predicted_remaining_tokens") == [9]


def test_limits_of_the_configuration_hold_for_requests_without_their_own():
    rows = make_rows(ttft_slo_s=2.0, e2e_slo_s=30.0)
    requests = [FakeRequest("a", 9.0), FakeRequest("b", 9.0, extra_args={TTFT_SLO_S: 5.0})]
    features = read(rows, requests, [])
    assert column(features, "ttft_slack_s") == [1.0, 4.0]
    assert column(features, "deadline_slack_s") == [29.0, 29.0]


class First:
    """Scores by prompt length and notes how many it was asked for."""

    name = "first"
    information = "blind"
    memory_size = 0

    def __init__(self):
        self.sizes = []
        self.seen = set()

    def score(self, features, memory):
        self.sizes.append(len(features))
        prompts = features[:, OrderingFeature["PROMPT_TOKENS"]]
        self.seen |= set(prompts.tolist())
        return prompts.copy()


def test_of_a_long_queue_only_a_part_is_scored_each_step_and_all_in_turn():
    policy = First()
    config = PluginConfig(max_scored_waiting=10)
    orderer = Orderer(policy, config, block_size=4, max_num_batched_tokens=16)
    waiting = [FakeRequest(str(i), float(i), num_prompt_tokens=1000 - i) for i in range(95)]
    running = [FakeRequest("r", 0.0, num_prompt_tokens=1, num_computed_tokens=1)]
    for _ in range(10):
        ranking = orderer.rank(waiting, running, 100.0, 0.0)
    assert policy.sizes == [11] * 10
    # ten a step: after ten steps every newcomer has had its turn, and the order is right
    assert len(policy.seen) == 96
    assert ranking.order.tolist() == [*range(94, -1, -1), 95]
    policy.seen.clear()
    for _ in range(20):
        orderer.rank(waiting, running, 100.0, 0.0)
    # half of the ten go to the best, half to those not scored for longest
    assert len(policy.seen) == 96
    assert max(policy.sizes) <= 11


def test_newcomers_that_had_no_turn_yet_are_last():
    config = PluginConfig(max_scored_waiting=2)
    orderer = Orderer(First(), config, block_size=4, max_num_batched_tokens=16)
    waiting = [FakeRequest(str(i), float(i), num_prompt_tokens=10 - i) for i in range(4)]
    assert orderer.rank(waiting, [], 10.0, 0.0).order.tolist() == [1, 0, 2, 3]


def test_equal_scores_go_by_arrival():
    orderer = Orderer(First(), PluginConfig(), block_size=4, max_num_batched_tokens=16)
    waiting = [FakeRequest(str(i), arrival) for i, arrival in enumerate((3.0, 1.0, 2.0))]
    running = [FakeRequest(f"r{i}", arrival) for i, arrival in enumerate((6.0, 5.0))]
    ranking = orderer.rank(waiting, running, 10.0, 0.0)
    assert ranking.order.tolist() == [1, 2, 0, 4, 3]


def test_step_times_are_averaged():
    orderer = Orderer(First(), PluginConfig(), block_size=4, max_num_batched_tokens=16)
    for duration_s in (0.1, 0.1, 0.3):
        orderer.note_step(duration_s)
    assert orderer._step_s == pytest.approx(0.1 + 0.05 * 0.2)


def test_scores_of_the_wrong_shape_say_so():
    class Wrong(First):
        def score(self, features, memory):
            return np.zeros((len(features), 2))

    orderer = Orderer(Wrong(), PluginConfig(), block_size=4, max_num_batched_tokens=16)
    with pytest.raises(InvalidScores, match=r"1 requests got scores of shape \(1, 2\)"):
        orderer.rank([FakeRequest("a")], [], 0.0, 0.0)


def test_the_schema_is_as_wide_as_the_rows():
    assert read(make_rows(), [FakeRequest("a")], []).shape == (1, NUM_ORDERING_FEATURES)
