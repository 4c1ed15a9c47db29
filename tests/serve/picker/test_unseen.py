"""Which features of tokens a policy's choice goes by, found by trying."""

from __future__ import annotations

import pytest

from servegym.baselines.registry import policy
from servegym.baselines.score import score_policy
from servegym.serve.loaded_policy import load_policy
from servegym.serve.picker.unseen import require_seen, unseen_features
from servegym.serve.runtime import RuntimeConfig


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("round-robin", []),
        ("random", []),  # draws the same twice
        ("least-outstanding", []),
        ("added-delay", []),
        ("prefix-load", []),
        ("llm-d", []),
        ("sglang", []),
        ("min-kv", []),
        ("mct", ["generated_tokens"]),  # only where more wait than may run
        ("least-work-left", ["generated_tokens"]),
        ("linucb", ["what became of each request"]),
    ],
)
def test_rules_read_what_their_formulas_say(name, expected):
    assert unseen_features(policy(name)) == expected


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("outstanding_requests + kv_cache_usage", []),
        ("outstanding_requests + recent_ttft_s", ["recent_ttft_s"]),
        ("recent_tpot_s * generated_tokens", ["recent_tpot_s", "generated_tokens"]),
        (
            "where(outstanding_requests > 25, -generated_tokens, kv_cache_usage)",
            ["generated_tokens"],
        ),
    ],
)
def test_a_score_reads_what_stands_in_it(score, expected):
    assert unseen_features(score_policy(score)) == expected


def test_groups_that_are_inferred_are_known_from_what_is_asked_for():
    assert unseen_features(policy("added-delay-observed")) == ["step_time_ratio", "recent_itl_s"]


def test_a_policy_is_as_it_was_after_it_was_tried():
    tried, other = policy("round-robin"), policy("round-robin")
    for rule in (tried, other):
        rule.reset(1, 5)
    assert unseen_features(tried) == []
    assert tried.memory.tolist() == other.memory.tolist()
    assert tried.rng.tolist() == other.rng.tolist()


def test_a_network_that_comes_with_servegym_is_refused_by_the_features_it_reads():
    loaded = load_policy("generalist", RuntimeConfig())
    with pytest.raises(Exception, match=r"generalist goes by .*\(response: headers\)"):
        require_seen(loaded, "headers")
