"""What each rule chooses in situations small enough to be computed by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from servegym.baselines.placement import placement
from servegym.baselines.registry import RULES, policy
from servegym.errors import ConfigError
from servegym.policy.contract import (
    REPLICA_FEATURES,
    REQUEST_FEATURES,
    Group,
    ReplicaFeature,
    RequestFeature,
)
from servegym.policy.policy import Heuristic, Observations

Rows = Mapping[str, float | Sequence[float]]

#: Three idle, equal replicas, and a request of 100 prompt and 50 predicted output tokens.
REPLICA = {
    "up": 1.0,
    "relative_speed": 1.0,
    "prefill_tokens_per_s": 1000.0,
    "decode_step_s": 0.01,
    "kv_capacity_tokens": 1000.0,
    "max_num_seqs": 64.0,
    "max_num_batched_tokens": 2048.0,
    "step_time_ratio": 1.0,
    "prefills": 1.0,
    "decodes": 1.0,
}
REQUEST = {
    "prompt_tokens": 100.0,
    "predicted_output_tokens": 50.0,
    "expected_tokens": 20.0,
    "ttft_slo_s": 10.0,
    "tpot_slo_s": 1.0,
}
EVERYWHERE = (True, True, True, False, False)


def situation(rows: Rows, mask: Sequence[bool] = EVERYWHERE) -> Observations:
    replicas = np.zeros((1, len(REPLICA_FEATURES), 3))
    for name, values in {**REPLICA, **rows}.items():
        replicas[0, ReplicaFeature[name.upper()]] = values
    request = np.zeros((1, len(REQUEST_FEATURES)))
    for name, value in REQUEST.items():
        request[0, RequestFeature[name.upper()]] = value
    return Observations(replicas, request, np.array([mask]))


def ready(text: str, seed: int = 0) -> Heuristic:
    rule = policy(text)
    rule.reset(1, seed)
    return rule


def choose(text: str, rows: Rows, mask: Sequence[bool] = EVERYWHERE) -> int:
    return int(ready(text).act(situation(rows, mask), np.array([0]))[0])


def choices(text: str, rows: Rows, count: int, mask: Sequence[bool] = EVERYWHERE) -> list[int]:
    rule = ready(text)
    return [int(rule.act(situation(rows, mask), np.array([0]))[0]) for _ in range(count)]


LLM_D = {
    "num_waiting": (4, 2, 0),
    "kv_cache_usage": (0.0, 0.5, 0.9),
    "prefix_hit_tokens": (0, 50, 0),
}
LOADED = {
    "num_waiting": (0, 50, 128),
    "num_running": (10, 4, 7),
    "outstanding_requests": (3, 1, 4),
}
DYNAMO = {
    "pending_prefill_tokens": (100, 0, 200),
    "prefix_hit_tokens": (80, 0, 100),
    "outstanding_prompt_tokens": (200, 300, 100),
    "outstanding_requests": (1, 1, 4),
}
HEXGEN = {
    "prefill_tokens_per_s": (1000, 2000, 500),
    "decode_step_s": (0.01, 0.005, 0.02),
    "pending_prefill_tokens": (100, 400, 50),
    "outstanding_predicted_tokens": (100, 400, 30),
    "generated_tokens": (10, 40, 10),
}
SLOW_OR_BUSY = {"decode_step_s": (0.02, 0.002, 0.03), "pending_prefill_tokens": (0, 800, 0)}
FIVE_THERE = {"outstanding_requests": (5, 0, 0), "pending_prefill_tokens": (0, 300, 200)}
LATELY_SLOW = {"decode_step_s": (0.01, 0.02, 0.03), "step_time_ratio": (3, 1, 1)}
DISPLACING = {
    "pending_prefill_tokens": (0, 260, 400),
    "prefix_hit_tokens": (0, 60, 0),
    "kv_capacity_tokens": (1000, 8000, 500),
}
PUSHED = {"pushed_over_40": (2, 0, 5), "pushed_over_50": (2, 3, 5)}
WORK = {
    "outstanding_requests": 1,
    "outstanding_predicted_tokens": (40, 60, 80),
    "generated_tokens": 0,
}
LLUMNIX = {"kv_cache_usage": (0.4, 0.2, 0.9), "num_running": (5, 10, 1)}
MCT = {
    "outstanding_requests": (9, 4, 4),
    "pending_prefill_tokens": (0, 200, 0),
    "prefix_hit_tokens": (0, 60, 0),
    "prefill_tokens_per_s": (1000, 1000, 200),
    "decode_step_s": (0.01, 0.01, 0.004),
    "decode_seq_s": (0.001, 0.0, 0.001),
}
PREFIX_LOAD = {
    "pending_prefill_tokens": (0, 0, 300),
    "prefix_hit_tokens": (0, 80, 100),
    "outstanding_requests": (1, 5, 0),
    "relative_speed": (1, 1, 0.5),
}
ADDED = {
    "pending_prefill_tokens": (0, 300, 0),
    "prefix_hit_tokens": (80, 0, 0),
    "outstanding_requests": (4, 0, 2),
    "decode_seq_s": 0.001,
}
FAST_TO_SLOW = {"outstanding_requests": (8, 3, 1), "relative_speed": (1, 0.5, 0.25)}

#: Seconds to the first token: 0.3 + 0.1, (500 + 20) / 2000, (2000 + 100) / 5000.
CONDUCTOR = {
    "pending_prefill_tokens": (300, 500, 2000),
    "prefix_hit_tokens": (0, 80, 0),
    "prefill_tokens_per_s": (1000, 2000, 5000),
    "outstanding_requests": (0, 0, 10),
    "decode_seq_s": 0.001,
}
#: 0.92, 0.4, 0.41; and where the 80 tokens of the first are fetched 0.32 + 0.02 + 80 / 2000, and
#: 0.33 + 0.02 + 80 / 4000.
FETCHING = {
    "pending_prefill_tokens": (900, 300, 310),
    "prefix_hit_tokens": (80, 0, 0),
    "prefill_tokens_per_s": 1000,
    "kv_tokens_per_s": (4000, 2000, 8000),
    "link_busy_s": (0.02, 0, 0.01),
}
#: One that only prefills, and two that do all, of which the first has most of the prompt.
DECIDER = {
    "decodes": (0, 1, 1),
    "num_waiting": (0, 2, 0),
    "kv_cache_usage": (0.0, 0.5, 0.2),
    "prefix_hit_tokens": (0, 95, 0),
}
#: Two that only prefill, and one that does all.
POOLS = {"decodes": (0, 0, 1), "pending_prefill_tokens": (500, 300, 100)}
MAY_REJECT = (True, True, False, False, True)
MAY_HOLD = (True, True, True, True, False)

HAND = [
    ("conductor", CONDUCTOR, 1),
    ("conductor-predicted", CONDUCTOR, 1),
    ("conductor", FETCHING, 1),
    ("conductor:threshold=1", FETCHING, 2),
    ("conductor:threshold=1", {**FETCHING, "kv_tokens_per_s": 0}, 1),
    # 80 are not more than twice as many as 40: 0.36 and 0.37
    ("conductor:threshold=2", {**FETCHING, "prefix_hit_tokens": (80, 40, 40)}, 1),
    # 1 decodes: 2 * 0.5 + 3 * 0.95 against 2 + 2 * 0.8; it lacks 5 tokens
    ("llm-d-pd", DECIDER, 1),
    ("llm-d-pd:non_cached_tokens=5", DECIDER, 0),
    ("llm-d-pd:non_cached_tokens=5,prompt_tokens=101", DECIDER, 1),
    # 2 decodes: 1 against 3.6; it lacks 100 tokens
    ("llm-d-pd", {**DECIDER, "prefix_hit_tokens": 0}, 0),
    ("llm-d-pd:non_cached_tokens=0", {**DECIDER, "prefix_hit_tokens": 0}, 2),
    ("splitwise", POOLS, 1),
    ("splitwise:max_pending_tokens=399", POOLS, 2),  # 300 + 100 are too many
    ("splitwise:max_pending_tokens=199", {**POOLS, "pending_prefill_tokens": (9, 0, 0)}, 1),
    # nobody has room: the fewest pending
    ("splitwise:max_pending_tokens=199", POOLS, 2),
    ("splitwise:max_pending_tokens=199", {**POOLS, "pending_prefill_tokens": (500, 200, 300)}, 1),
    # a step that decodes one more: 0.01 + 5 * 0.001, 0.01 + 0.004, 0.02
    (
        "least-tpot",
        {
            "outstanding_requests": (5, 4, 0),
            "decode_step_s": (0.01, 0.01, 0.02),
            "decode_seq_s": 0.001,
        },
        1,
    ),
    ("least-outstanding", {"outstanding_requests": (3, 1, 2)}, 1),
    (
        "token-least-load",
        {
            "outstanding_prompt_tokens": (500, 100, 300),
            "pending_prefill_tokens": (500, 100, 300),
            "outstanding_requests": (1, 2, 1),
        },
        1,
    ),
    # (n + 1) / s^eta: 9, 4, 2 -- 9, 5.7, 4 -- 9, 8, 8 -- 9, 16, 32
    ("speed-family:eta=0", FAST_TO_SLOW, 2),
    ("speed-family:eta=0.5", FAST_TO_SLOW, 2),
    ("speed-family:eta=1", FAST_TO_SLOW, 1),
    ("speed-family:eta=2", FAST_TO_SLOW, 0),
    ("min-kv", {"kv_cache_usage": (0.5, 0.2, 0.3)}, 1),
    ("min-kv", {"kv_cache_usage": (0.5, 0.2, 0.2), "outstanding_requests": (0, 3, 1)}, 2),
    # seconds left: 0.3 + 50 * 0.01, 40 * 0.01, (100 - 80) * 0.01
    (
        "least-work-left",
        {
            "outstanding_requests": 1,
            "pending_prefill_tokens": (300, 0, 0),
            "outstanding_predicted_tokens": (50, 40, 100),
            "generated_tokens": (0, 0, 80),
        },
        2,
    ),
    # more came out than predicted: nothing is left, not -60 tokens; so 0.3, 0.1 and 0.2 s
    (
        "least-work-left",
        {
            "outstanding_requests": 1,
            "pending_prefill_tokens": (300, 100, 200),
            "outstanding_predicted_tokens": (40, 40, 40),
            "generated_tokens": (100, 40, 40),
        },
        1,
    ),
    # queue (4-q)/4: 0, .5, 1; kv 1-u: 1, .5, .1; prefix: 0, .5, 0; weights 2, 2, 3
    ("llm-d", LLM_D, 1),  # 2, 3.5, 2.2
    ("llm-d:prefix=0", LLM_D, 2),  # 2, 2, 2.2
    ("llm-d:queue=0,prefix=0", LLM_D, 0),  # 2, 1, 0.2
    # equal queues score 1 each, so 2 + 2 * (1 - kv): 4, 3, 2.2
    ("llm-d", {"num_waiting": 7, "kv_cache_usage": (0.0, 0.5, 0.9)}, 0),
    # load 0.5 - 0.5 q / 128: .5, .305, 0; running: 0, 1, .5; active (4 - n) / 4: .25, .75, 0
    ("llm-d:queue=0,kv=0,prefix=0,load=1", LOADED, 0),
    ("llm-d:queue=0,kv=0,prefix=0,running=1", LOADED, 1),
    ("llm-d:queue=0,kv=0,prefix=0,active=1", LOADED, 1),
    ("llm-d:queue=0,kv=0,prefix=0,load=2,active=1", LOADED, 1),  # 1.25, 1.36, 0
    ("llm-d:queue=0,kv=0,prefix=0,load=2,active=1,busy=0.5", LOADED, 0),  # 1.125, 0.98, 0
    ("llm-d:queue=0,kv=0,prefix=0,load=2,active=1,idle=1", LOADED, 1),  # 1.25, 1.61, 0
    ("llm-d:queue=0,kv=0,prefix=0,load=2,active=1,idle=3", LOADED, 0),  # 2, 1.61, 0
    # 50 are no more than 50: .5, 0, 0; and with 1.5 of running: 0.5, 1.5, 0.75
    ("llm-d:queue=0,kv=0,prefix=0,load=1,load_threshold=50,running=0.4", LOADED, 0),
    ("llm-d:queue=0,kv=0,prefix=0,load=1,load_threshold=50,running=1.5", LOADED, 1),
    ("llm-d-predicted", LLM_D, 1),  # as llm-d, before anything has ended
    ("linucb:alpha=0", FIVE_THERE, 2),  # others wait 5 * 0.1 s, own wait 0.3 s, 0.2 s
    ("linucb:alpha=0,price=0", FIVE_THERE, 0),
    # blocks of 10: prefill (100+100-80)/10, (0+100)/10, (200+100-100)/10 = 12, 10, 20
    # decode (200+100)/10, (300+100)/10, (100+100)/10 = 30, 40, 20
    ("dynamo:block_tokens=10", DYNAMO, 2),  # 42, 50, 40
    ("dynamo:block_tokens=10,prefill_scale=2", DYNAMO, 0),  # 54, 60, 60
    ("dynamo:block_tokens=10,per_request=4", DYNAMO, 0),  # 46, 54, 56
    # without credit 20 + 30, 10 + 40, 30 + 20: the requests decide
    (
        "dynamo:block_tokens=10,overlap=0,per_request=4",
        {**DYNAMO, "outstanding_requests": (1, 0, 4)},
        1,
    ),
    # credit 2 * 10 exceeds the 10 blocks: 0, not -10; so 0 + 25, 10 + 14, 10 + 90
    (
        "dynamo:block_tokens=10,overlap=2",
        {"prefix_hit_tokens": (100, 0, 0), "outstanding_prompt_tokens": (150, 40, 800)},
        1,
    ),
    # own time 0.6, 0.3, 1.2 s; work 0.1 + 0.9, 0.2 + 1.8, 0.1 + 0.4 s
    ("hexgen:alpha=0.2", HEXGEN, 2),  # -0.6, -1.2, -0.3
    ("hexgen:alpha=0.8", HEXGEN, 1),  # 0.6, 1.2, 0.3
    # the reference engine is idle: it is taken, whatever else is faster
    (
        "hexgen:alpha=0.8",
        {
            **HEXGEN,
            "pending_prefill_tokens": (0, 400, 50),
            "outstanding_predicted_tokens": (10, 400, 30),
        },
        0,
    ),
    # free / running: 600/5, 800/10, 100/1
    ("llumnix", LLUMNIX, 0),
    # the head of queue 0 wants 700/7 = 100 tokens and counts as running: 500/6, 800/10, 100/1
    (
        "llumnix",
        {
            **LLUMNIX,
            "num_waiting": (2, 0, 0),
            "outstanding_requests": (7, 10, 1),
            "outstanding_prompt_tokens": (700, 0, 0),
        },
        2,
    ),
    # nothing runs or waits on 2: free for ever
    ("llumnix", {**LLUMNIX, "num_running": (5, 10, 0)}, 2),
    # 0.1 + 50 * 0.019, 0.24 + 50 * 0.01, 0.5 + 50 * 0.008 = 1.05, 0.74, 0.9 s
    ("mct", MCT, 1),
    # only 4 run on 1, so one of 5 waits: 800 tokens left of 4 requests, 1/4 * 800/4 * 0.01 = 0.5 s
    ("mct", {**MCT, "max_num_seqs": (64, 4, 64), "outstanding_predicted_tokens": (0, 800, 0)}, 2),
    # prefill 0.1, 0.02, 0.3 s; (n + 1) / s: 2, 6, 2
    ("prefix-load", PREFIX_LOAD, 0),  # weight 0.05: 0.2, 0.32, 0.4
    ("prefix-load:weight=0.01", PREFIX_LOAD, 1),  # 0.12, 0.08, 0.32
    # own: 0.02 + 50 * 0.014, 0.4 + 50 * 0.01, 0.1 + 50 * 0.012 = 0.72, 0.9, 0.7 s
    # others: 4 * (0.02 + 0.05), 0, 2 * (0.1 + 0.05) = 0.28, 0, 0.3 s
    ("added-delay", ADDED, 1),
    ("added-delay:prefill=0,decode=0", ADDED, 2),
    # alone for 50 tokens 0.1 + 1, 0.8 + 0.1 + 0.1 and 0.1 + 1.5; for 20 tokens 0.5, 0.94 and 0.7
    ("added-delay", SLOW_OR_BUSY, 1),
    ("added-delay-shrink", SLOW_OR_BUSY, 0),
    ("added-delay-shrink:shrink=0", SLOW_OR_BUSY, 1),
    # 0.6, 1.1 and 1.6 for 50 tokens, 0.3, 0.5 and 0.7 for 20; the first three times as long
    ("added-delay", LATELY_SLOW, 0),
    ("added-delay-observed", LATELY_SLOW, 1),
    ("added-delay-inferred", LATELY_SLOW, 1),
    ("added-delay-inferred:observed=0.4", LATELY_SLOW, 0),  # 0.3 * 3^0.4 = 0.466
    ("added-delay-held", SLOW_OR_BUSY, 0),
    # 0.3, 0.5 and 0.7 s; 100 of 1,000, 40 of 8,000 and 100 of 500 tokens are displaced
    ("added-delay-shrink", DISPLACING, 0),
    ("added-delay-shrink:displaced=2", DISPLACING, 0),  # 0.3 + 0.2, 0.5 + 0.01 and 0.7 + 0.4
    ("added-delay-shrink:displaced=3", DISPLACING, 1),  # 0.3 + 0.3, 0.5 + 0.015 and 0.7 + 0.6
    ("added-delay-reject", SLOW_OR_BUSY, 1),
    ("added-delay-reject:shrink=1", SLOW_OR_BUSY, 0),
    # 0.3 s each: what is over half of its limit costs 10 s
    ("class-aware", {}, 0),
    ("class-aware", {"pushed_over_50": (1, 0, 0)}, 1),
    ("class-aware:pushed=0", {"pushed_over_50": (1, 0, 0)}, 0),
    ("class-aware:pushed=1", PUSHED, 0),  # 0.3 + 2 against 0.3 + 3
    ("class-aware:pushed=1,tpot=0.45", PUSHED, 1),  # 0.3 + 1 + 1, 0.3 + 1.5 and 0.3 + 5
    ("class-aware", {"pending_prefill_tokens": (4900, 4880, 4880)}, 1),  # TTFT 5.01 and 4.99
    ("class-aware:late=0", {"pending_prefill_tokens": (4870, 4880, 4900)}, 0),
    ("class-aware:late=0", {"decode_step_s": (0.501, 0.499, 0.499)}, 1),  # 0.51 of the limit
    ("class-aware:slow=0", {"decode_step_s": (0.501, 0.502, 0.503)}, 0),
    ("least-work-left", {**WORK, "expected_tokens_left": (90, 50, 70)}, 0),
    ("least-work-left:shrink=1", {**WORK, "expected_tokens_left": (90, 50, 70)}, 1),
    ("mct:shrink=1", SLOW_OR_BUSY, 0),
    ("hexgen:shrink=1", {**HEXGEN, "expected_tokens_left": (0, 9000, 9000)}, 0),
    ("what-if", {"what_if_e2e_s": (3, 1, 2), "what_if_added_s": (1, 2, 3)}, 1),
    ("what-if-added", {"what_if_e2e_s": (3, 1, 2), "what_if_added_s": (1, 2, 3)}, 0),
    ("what-if-sampled", {"what_if_e2e_s": (3, 1, 2), "what_if_added_s": (1, 2, 3)}, 0),
]


@pytest.mark.parametrize(("text", "rows", "expected"), HAND)
def test_rule_makes_the_hand_computed_choice(text, rows, expected):
    assert choose(text, rows) == expected


MEMORY = {"round-robin", "weighted-round-robin", "sglang", "sglang-older"}
DRAWS = {"random", "power-of-two", "dynamo", "llm-d", "llm-d-pd", "llm-d-predicted", "linucb"}


@pytest.mark.parametrize("name", RULES.names())
def test_every_rule_has_a_hand_computed_choice_here(name):
    computed = {text.partition(":")[0] for text, _, _ in HAND} | MEMORY | {"random", "power-of-two"}
    assert name.removesuffix("-oracle") in computed


@pytest.mark.parametrize(
    ("ttft_slo_s", "tpot_slo_s", "chosen"),
    [(0.3, 0.03, 1), (0.2, 0.03, 4), (0.3, 0.015, 4)],
)
def test_conductor_rejects_what_would_miss_a_limit(ttft_slo_s, tpot_slo_s, chosen):
    # the third only decodes: it is up, and may not be chosen; 0.01 + 10 * 0.001 s a token
    seen = situation(CONDUCTOR, MAY_REJECT)
    seen.request[0, RequestFeature.TTFT_SLO_S] = ttft_slo_s
    seen.request[0, RequestFeature.TPOT_SLO_S] = tpot_slo_s
    assert ready("conductor").act(seen, np.array([0])).tolist() == [chosen]


@pytest.mark.parametrize(
    ("parameters", "mask", "waited_s", "chosen"),
    [
        # 0.4 s of prefill wait at the second, whose cost is least: 0.4 + 0.1 + 20 * 0.002 s
        ("wait=0.5", MAY_HOLD, 0.0, 1),
        ("wait=0.3", MAY_HOLD, 0.0, 3),
        ("wait=0.3", MAY_HOLD, 60.0, 1),
        ("wait=0.3,most=2", MAY_HOLD, 1.9, 3),
        ("wait=0.3,most=2", MAY_HOLD, 2.0, 1),
        ("wait=0.3", EVERYWHERE, 0.0, 1),
    ],
)
def test_a_request_is_held_while_prefill_waits_where_it_would_go(
    parameters, mask, waited_s, chosen
):
    rows = {"decode_step_s": (0.03, 0.002, 0.04), "pending_prefill_tokens": (0, 400, 0)}
    seen = situation(rows, mask)
    seen.request[0, RequestFeature.WAITED_S] = waited_s
    rule = ready(f"added-delay-held:{parameters}")
    assert rule.act(seen, np.array([0])).tolist() == [chosen]


def test_a_threshold_of_the_conductor_below_one_is_refused():
    with pytest.raises(ConfigError, match="or 0 to fetch nothing, got 0"):
        policy("conductor:threshold=0.5")


@pytest.mark.parametrize(
    ("outstanding", "tpot_slo_s", "now", "then"),
    [
        ((0, 0, 10), 0.0195, 4, 1),  # 0.01 + 0.001 * 10 a token now, and * 8 then
        ((0, 3, 10), 0.0205, 1, 4),  # 11 then, with the 3 that are prefilled before this one
        ((0, 3, 10), 0.0215, 1, 1),
        ((3, 0, 10), 0.0205, 1, 4),  # of those 3, 0.26 of 0.3 s are over by then: 2.6
        ((2, 0, 10), 0.0205, 1, 1),
    ],
)
def test_predicted_rejection_goes_by_who_will_decode_after_the_prefill(
    outstanding, tpot_slo_s, now, then
):
    # the prefill is over in 0.26 s, and of those that decode a fifth has ended by then
    rows = {"prefills": (1, 1, 0), "decodes": (0, 0, 1), "outstanding_requests": outstanding}
    seen = situation({**CONDUCTOR, **rows}, MAY_REJECT)
    seen.request[0, RequestFeature.TPOT_SLO_S] = tpot_slo_s
    for text, chosen in (("conductor", now), ("conductor-predicted:decode_s=1.3", then)):
        assert ready(text).act(seen, np.array([0])).tolist() == [chosen]


@pytest.mark.parametrize(
    ("text", "rows", "expected"),
    [
        # two that only decode, and one that does all; 1,000 tokens each
        ("splitwise", {"kv_cache_usage": (0.5, 0.95, 0.1)}, 0),
        ("splitwise", {"kv_cache_usage": (0.95, 0.92, 0.1)}, 2),  # 920 + 100 are too many
        ("splitwise", {"kv_cache_usage": (0.95, 0.92, 0.96)}, 1),
        ("llm-d", LLM_D, 1),
    ],
)
def test_placement_makes_the_hand_computed_choice(text, rows, expected):
    rule = placement(text)
    rule.reset(1, 0)
    seen = situation({"prefills": (0, 0, 1), **rows})
    assert rule.act(seen, np.array([0])).tolist() == [expected]


@pytest.mark.parametrize(
    "text",
    sorted(set(RULES.names()) - MEMORY - DRAWS),
)
@pytest.mark.parametrize("first", [0, 1])
def test_first_of_equal_replicas_is_taken(text, first):
    mask = (first == 0, True, True, False, False)
    busy = {"outstanding_requests": 2, "outstanding_predicted_tokens": 90, "num_running": 2}
    assert choices(text, busy, 3, mask) == [first] * 3


@pytest.mark.parametrize("text", sorted(DRAWS))
def test_equal_replicas_are_taken_equally_often(text):
    counts = Counter(choices(text, {}, 3000))
    # 1,000 expected, standard deviation sqrt(3000 * 1/3 * 2/3) = 26
    assert all(abs(counts[r] - 1000) < 4 * 26 for r in range(3))


def test_drawn_by_score_a_replica_is_chosen_in_proportion_to_it():
    text = "llm-d:queue=0,prefix=0,kv=1,drawn=1"
    counts = Counter(choices(text, {"kv_cache_usage": (0.9, 0.7, 1.0)}, 4000))
    # scores 0.1, 0.3 and 0: 1,000 and 3,000 expected, standard deviation sqrt(4000 * 3/16) = 27
    assert abs(counts[0] - 1000) < 4 * 27
    assert counts[0] + counts[1] == 4000
    counts = Counter(choices(text, {"kv_cache_usage": 1.0}, 3000))  # all 0: evenly
    assert all(abs(counts[r] - 1000) < 4 * 26 for r in range(3))


def test_ties_are_broken_among_the_best_only():
    rows = {"kv_cache_usage": (0.1, 0.9, 0.1)}
    assert set(choices("llm-d", rows, 50)) == {0, 2}


@pytest.mark.parametrize("name", RULES.names())
@pytest.mark.parametrize("allowed", range(3))
def test_the_only_allowed_replica_is_chosen(name, allowed):
    mask = [r == allowed for r in range(3)] + [True, True]
    rows = {"outstanding_requests": [10 * (r == allowed) for r in range(3)]}
    assert choices(name, rows, 3, mask) == [allowed] * 3


@pytest.mark.parametrize("name", RULES.names())
def test_without_a_replica_a_rule_holds_or_else_rejects(name):
    assert choose(name, {}, (False, False, False, True, True)) == 3
    assert choose(name, {}, (False, False, False, False, True)) == 4


@pytest.mark.parametrize("name", RULES.names())
def test_a_masked_replica_is_never_chosen(name):
    rng = np.random.default_rng(1)
    rule = ready(name)
    for _ in range(200):
        mask = np.append(rng.random(3) < 0.5, (True, True))
        rows = {f.name: rng.uniform(0.1, 1, 3) for f in REPLICA_FEATURES}
        action = int(rule.act(situation(rows, mask), np.array([0]))[0])
        assert mask[action] if mask[:3].any() else action == 3


@pytest.mark.parametrize(
    ("text", "rejects"),
    [
        ("added-delay-reject:ttft=0.012", False),  # TTFT 0.1 + 0.01 of 10 s
        ("added-delay-reject:ttft=0.010", True),
        ("added-delay-reject:tpot=0.011", False),  # TPOT 0.01 of 1 s
        ("added-delay-reject:tpot=0.009", True),
        ("class-aware:most=0.31", False),  # 0.1 + 20 * 0.01
        ("class-aware:most=0.29", True),
    ],
)
def test_what_cannot_keep_its_limits_is_rejected_where_that_is_allowed(text, rejects):
    assert choose(text, {}, (True, True, True, True, True)) == (4 if rejects else 0)
    assert choose(text, {}, (True, True, True, True, False)) == 0


def test_one_replica_that_keeps_a_limit_is_enough_not_to_be_rejected():
    mask = (True, True, True, False, True)
    rows = {"pending_prefill_tokens": (9000, 9000, 0)}
    assert choose("added-delay-reject", rows, mask) == 2
    assert choose("added-delay-reject", {"pending_prefill_tokens": 9000}, mask) == 4


def test_round_robin_goes_round_and_skips_what_is_masked():
    assert choices("round-robin", {}, 5) == [0, 1, 2, 0, 1]
    assert choices("round-robin", {}, 4, (True, False, True, False, False)) == [0, 2, 0, 2]


def test_weighted_round_robin_is_smooth():
    # nginx's own example: weights 5, 1, 1
    rows = {"relative_speed": (5, 1, 1)}
    assert choices("weighted-round-robin", rows, 7) == [0, 0, 1, 0, 2, 0, 0]


def test_memory_is_forgotten_at_reset_and_kept_apart_by_environment():
    rule = policy("round-robin")
    rule.reset(2, 0)
    both = Observations(*(np.repeat(x, 2, axis=0) for x in situation({})))
    assert rule.act(both, np.array([0, 1])).tolist() == [0, 0]
    assert rule.act(both, np.array([0, 0])).tolist() == [1, 2]
    assert rule.act(both, np.array([0, 1])).tolist() == [0, 1]
    rule.reset(2, 0)
    assert rule.act(both, np.array([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("text", sorted(DRAWS))
def test_draws_follow_the_seed(text):
    def draws(seed):
        rule = ready(text, seed)
        return [int(rule.act(situation({}), np.array([0]))[0]) for _ in range(30)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_power_of_two_compares_two_different_replicas():
    # of two different replicas, the most loaded is never the better one
    counts = Counter(choices("power-of-two", {"outstanding_requests": (0, 1, 2)}, 3000))
    assert counts[2] == 0
    # pairs (0,1) and (0,2) go to 0, pair (1,2) to 1
    assert abs(counts[0] - 2000) < 4 * 26


def test_token_least_load_counts_prompts_until_they_are_computed():
    # Splitwise: tokens leave the counter with the prefill; 0 only decodes, 1 has 100 to compute
    rows = {
        "outstanding_prompt_tokens": (500, 100, 300),
        "pending_prefill_tokens": (0, 100, 300),
        "outstanding_requests": (1, 1, 1),
    }
    assert choose("token-least-load", rows) == 0


def test_least_work_left_sums_the_remaining_times_of_the_requests():
    # 100 tokens of one request: 1 s. 4 requests of 50 tokens each: 4 times 0.5 s. 2: 9 s.
    rows = {
        "outstanding_requests": (1, 4, 1),
        "outstanding_predicted_tokens": (100, 200, 900),
    }
    assert choose("least-work-left", rows) == 0


def test_sglang_follows_a_long_match():
    assert choose("sglang", {"prefix_hit_tokens": (0, 31, 20)}) == 1


def test_sglang_takes_the_smallest_tree_without_a_long_match():
    # 30 of 100 is not above the threshold 0.3; trees grow by 100, 70 and 100 tokens
    rows = {"prefix_hit_tokens": (0, 30, 0), "outstanding_requests": (5, 5, 0)}
    assert choices("sglang", rows, 5) == [0, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("outstanding", "expected"),
    [
        ((65, 9, 0), 2),  # 65 - 0 > 64 and 65 > 1.5 * 0: the least loaded
        ((64, 9, 0), 0),  # 64 - 0 is not above 64: the match
        ((300, 230, 250), 0),  # 70 > 64, but 300 < 1.5 * 230: the match
        ((300, 199, 250), 1),  # 101 > 64 and 300 > 1.5 * 199
    ],
)
def test_sglang_balances_when_both_thresholds_are_passed(outstanding, expected):
    rows = {"outstanding_requests": outstanding, "prefix_hit_tokens": (90, 0, 0)}
    assert choose("sglang", rows) == expected


def test_sglang_with_the_older_defaults_follows_half_matches_and_balances_earlier():
    text = "sglang-older"
    assert choose(text, {"prefix_hit_tokens": (0, 40, 0)}) == 0
    rows = {"outstanding_requests": (300, 260, 267), "prefix_hit_tokens": (90, 0, 0)}
    assert choose(text, rows) == 1
    assert choose("sglang", rows) == 0


def test_sglang_measures_balance_over_allowed_replicas_only():
    rows = {"outstanding_requests": (100, 90, 0), "prefix_hit_tokens": (90, 0, 0)}
    assert choose("sglang", rows) == 2
    assert choose("sglang", rows, (True, True, False, False, False)) == 0


def test_sglang_inserts_the_text_also_where_balance_decided():
    rule = ready("sglang")

    def act(rows):
        return int(rule.act(situation(rows), np.array([0]))[0])

    assert act({"outstanding_requests": (0, 100, 100)}) == 0
    assert act({}) == 1  # trees are now 100, 0, 0


#: What each information class sees; oracles see what predictive rules see, and it is true.
COUNTS = {"up", "outstanding_requests", "outstanding_prompt_tokens", "pending_prefill_tokens"}
PREDICTIONS = {
    "outstanding_predicted_tokens",
    "expected_tokens_left",
    *(f.name for f in REPLICA_FEATURES if f.group in (Group.LIMITS, Group.WHAT_IF)),
}


def decisions(name: str, scrambled: set[str], scramble_request: bool = False) -> list[int]:
    """Choices in 300 random situations, the scrambled rows drawn from another stream."""
    rng, other = np.random.default_rng(5), np.random.default_rng(6)
    rule = ready(name)
    high = [
        0.02 if f.name.startswith("decode_") else 1.0 if f.high == 1 else 100.0
        for f in REPLICA_FEATURES
    ]
    high = np.array(high)[:, None].repeat(3, axis=1)
    rows = np.array([[f.name in scrambled] for f in REPLICA_FEATURES])
    taken = []
    for _ in range(300):
        observations = situation({})
        drawn, replaced = rng.uniform(0.01, high), other.uniform(0.01, high)
        observations.replicas[0] = np.where(rows, replaced, drawn)
        predicted, replaced_prediction = rng.uniform(1, 300), other.uniform(1, 300)
        for column in (RequestFeature.PREDICTED_OUTPUT_TOKENS, RequestFeature.EXPECTED_TOKENS):
            observations.request[0, column] = replaced_prediction if scramble_request else predicted
        taken.append(int(rule.act(observations, np.array([0]))[0]))
    return taken


def of(information: str) -> list[str]:
    return [name for name in RULES.names() if policy(name).information == information]


@pytest.mark.parametrize("name", of("blind"))
def test_blind_rules_read_counts_only(name):
    hidden = {f.name for f in REPLICA_FEATURES} - COUNTS
    assert decisions(name, set()) == decisions(name, hidden, scramble_request=True)


@pytest.mark.parametrize("name", of("metric"))
def test_metric_rules_read_more_than_counts_but_no_predictions(name):
    assert decisions(name, set()) == decisions(name, PREDICTIONS, scramble_request=True)
    more = {f.name for f in REPLICA_FEATURES} - COUNTS - PREDICTIONS
    assert decisions(name, set()) != decisions(name, more)


@pytest.mark.parametrize("name", of("predictive") + of("oracle"))
def test_predictive_rules_read_predictions(name):
    assert decisions(name, set()) != decisions(name, PREDICTIONS, scramble_request=True)


@pytest.mark.parametrize("name", RULES.names())
def test_rules_read_only_the_groups_they_say_they_need(name):
    needs = policy(name).needs
    unread = {f.name for f in REPLICA_FEATURES if not f.group & needs}
    assert decisions(name, set()) == decisions(name, unread)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (name, group)
        for name in RULES.names()
        for group in (Group.METRICS, Group.PREFIX, Group.WHAT_IF, Group.STEP_TIMES, Group.LIMITS)
        if policy(name).needs & group
    ],
)
def test_rules_need_no_group_they_do_not_read(name, group):
    rows = {f.name for f in REPLICA_FEATURES if f.group == group}
    assert decisions(name, set()) != decisions(name, rows)
