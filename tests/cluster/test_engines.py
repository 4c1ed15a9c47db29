"""The rules of each engine on episodes computed by hand; both programs must get every time right.

As in `test_toys`, a step lasts 1 s, 0.1 s per token in it, 0.01 s per pair of a prefilled token
and a token of its context, and 0.001 s per KV token the decodes attend to. A block is 4 tokens
unless a test says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from servegym.cluster.spec import ClusterSpec, ReplicaType
from servegym.cluster.state import FAULT_DOWN, FAULT_UP
from servegym.engines import ENGINES, EngineName
from servegym.errors import ConfigError

from ..toys import linear_grid  # noqa: TID252 - tests are no package
from .test_toys import (
    Play,
    assert_times,
    play_compiled,
    play_plain,
    toy_cluster,
    toy_episode,
)


@pytest.fixture(name="play", params=[play_compiled, play_plain], ids=["compiled", "plain"])
def both_programs(request: pytest.FixtureRequest) -> Play:
    return request.param


def cluster(
    engine: EngineName,
    *,
    num_blocks: int = 64,
    budget: int = 64,
    seqs: int = 8,
    block_size: int = 4,
    **rules: object,
) -> ClusterSpec:
    kind = ReplicaType("toy", linear_grid(), num_blocks, budget, seqs, engine=engine)
    return toy_cluster(kind, block_size=block_size, **rules)


@pytest.mark.parametrize(
    ("engine", "first_token_s", "finish_s"),
    [
        # one decode (kv 11) beside the 10 prefilled: 2.111; two decodes: 1.223; one: 1.112
        ("vllm", [2, 4.111], [5.334, 6.446]),
        ("trtllm", [2, 4.111], [5.334, 6.446]),
        # the first pauses: prefill 2; then both decode (kv 22 and 24): 1.222 + 1.224
        ("vllm-v0", [2, 4], [6.446, 6.446]),
        ("sglang", [2, 4], [6.446, 6.446]),
    ],
)
def test_decodes_run_beside_a_prefill_or_pause(play, engine, first_token_s, finish_s):
    played = play(cluster(engine), toy_episode([(0, 10, 3), (0.5, 10, 3)]), {})
    assert_times(played, first_token_s=first_token_s, finish_s=finish_s)


@pytest.mark.parametrize(
    ("engine", "scheduled_s", "first_token_s", "finish_s"),
    [
        # 10 + a chunk of 6: 2.6; decode (kv 11) + 4 over 6: 1.5 + 0.24 + 0.011; decode (kv 11)
        ("vllm", [0, 0], [2.6, 4.351], [4.351, 5.462]),
        # 10: 2; decode (kv 11) + 10: 2.1 + 0.011; decode (kv 11)
        ("trtllm", [0, 2], [2, 4.111], [4.111, 5.222]),
        # 10: 2; 10: 2; both decode (kv 22)
        ("vllm-v0", [0, 2], [2, 4], [5.222, 5.222]),
        # 10 count as 12, so a chunk of 4: 2.4; 6 over 4: 1.6 + 0.24; both decode (kv 22)
        ("sglang", [0, 0], [2.4, 4.24], [5.462, 5.462]),
    ],
)
def test_a_prompt_beyond_the_budget_is_cut_or_waits(
    play, engine, scheduled_s, first_token_s, finish_s
):
    played = play(cluster(engine, budget=16), toy_episode([(0, 10, 2), (0, 10, 2)]), {})
    assert_times(played, scheduled_s=scheduled_s, first_token_s=first_token_s, finish_s=finish_s)


def test_sglang_without_chunks_computes_a_prompt_beyond_its_limit_alone(play):
    spec = cluster("sglang", budget=8, chunked_prefill=False)
    played = play(spec, toy_episode([(0, 10, 1), (0, 4, 1), (0, 4, 1)]), {})
    # 10: 2; 4 count 4, what is left is not more than the next 4: 1.4; 4: 1.4
    assert_times(played, finish_s=[2, 3.4, 4.8])


@pytest.mark.parametrize(
    ("prompt", "scheduled_s", "finish_s"),
    [
        # the first holds 95 of 100 blocks; 4 more leave the one of the watermark.
        # 380 + 16: 40.6; decode (kv 381): 1.481
        (16, 0, [42.081, 40.6]),
        # 5 more would not: 380: 39; decode; then 17: 2.7
        (17, 40.481, [40.481, 43.181]),
    ],
)
def test_vllm_v0_admits_nobody_below_its_watermark(play, prompt, scheduled_s, finish_s):
    spec = cluster("vllm-v0", num_blocks=100, budget=512)
    played = play(spec, toy_episode([(0, 380, 2), (0, prompt, 1)]), {})
    assert_times(played, scheduled_s=[0, scheduled_s], finish_s=finish_s)


def test_vllm_v0_preempts_for_a_free_block_that_nobody_needs_yet(play):
    played = play(cluster("vllm-v0", num_blocks=3), toy_episode([(0, 5, 3), (0, 3, 3)]), {})
    # 1. prefill 5 and 3, two blocks and one: 1.8
    # 2. no block is free, so the second goes, although both have room: decode (kv 6) -> 2.906
    # 3. its 4 tokens fit the one free block: prefill 1.4 -> 4.306
    # 4. it goes again: decode (kv 7) -> 5.413, the first ends
    # 5. prefill 5: 1.5 -> 6.913
    assert_times(played, first_token_s=[1.8, 1.8], finish_s=[5.413, 6.913])
    assert played.outcomes["num_preemptions"].tolist() == [0, 2]


def test_sglang_keeps_room_for_a_share_of_the_tokens_to_come_and_retracts(play):
    spec = cluster("sglang", num_blocks=56, block_size=1)
    played = play(spec, toy_episode([(0, 2, 30), (0, 2, 30)]), {})
    # 1. of 56 tokens the first takes 2 and, in its batch, 31 more: the second's 33 do not fit: 1.2
    # 2. of the 29 to come 70 % count: 54 - 20.3 > 33, so the second is admitted: 1.2 -> 2.4
    # 3. 26 decodes of both (kv 6, 8, ..., 56) use up the rest: 31.2 + 0.806      -> 34.406
    # 4. both have 27 tokens, so the last place goes. The first decodes (kv 29, 30, 31), and the
    #    second's 29 + 3 + 1 are more than what is free: 3.39                       -> 37.796
    # 5. prefill 29: 3.9; decodes (kv 30, 31): 2.261                               -> 43.957
    assert_times(played, first_token_s=[1.2, 2.4], finish_s=[37.796, 43.957])
    assert played.outcomes["num_preemptions"].tolist() == [0, 1]


def test_sglang_retracts_the_fewest_output_tokens_and_sends_them_to_the_end_of_the_queue(play):
    spec = cluster("sglang", num_blocks=56, block_size=1)
    # as above, but the second is first by a step, and a third waits when it is retracted
    played = play(spec, toy_episode([(0, 2, 30), (0, 2, 30), (34, 30, 1)]), {})
    # 4. at 34.406 the second goes behind the third. The first decodes (kv 29) -> 35.535, and then
    #    neither the third's 30 + 1 + 1 nor the second's 33 fit: kv 30, 31 -> 37.796
    # 5. the third (30) is admitted first, and 32 + 1 of 26 - 2 do not fit: 4.0   -> 41.796, it ends
    # 6. prefill 29: 3.9; decodes (kv 30, 31): 2.261                              -> 47.957
    assert_times(played, scheduled_s=[0, 1.2, 37.796], finish_s=[37.796, 47.957, 41.796])


def test_sglang_admits_into_a_full_batch_one_decode_step_after_an_end(play):
    spec = cluster("sglang", seqs=2)
    played = play(spec, toy_episode([(0, 10, 2), (0, 10, 4), (0, 10, 1)]), {})
    # 1. prefill 20: 3; 2. decode (kv 22): 1.222 -> 4.222, the first ends, but the batch is full
    # 3. decode (kv 12): 1.112 -> 5.334; 4. prefill 10: 2 -> 7.334; 5. decode (kv 13): 1.113
    assert_times(played, scheduled_s=[0, 0, 5.334], finish_s=[4.222, 8.447, 7.334])


def test_trtllm_sets_blocks_aside_for_whole_outputs(play):
    spec = cluster("trtllm", num_blocks=5)
    played = play(spec, toy_episode([(0, 4, 9), (0, 4, 5), (0, 1, 1)]), {})
    # the first two end with 3 and 2 blocks, so the third waits, although 3 are free at first
    # 1. prefill 8: 1.8; 2. four decodes (kv 10, 12, 14, 16): 4.852 -> 6.652, the second ends
    # 3. decode (kv 9) + 1: 1.209 -> 7.861; 4. decodes (kv 10, 11, 12): 3.333 -> 11.194
    assert_times(played, scheduled_s=[0, 0, 6.652], finish_s=[11.194, 6.652, 7.861])
    assert not played.outcomes["num_preemptions"].any()


def test_a_request_must_fit_what_an_engine_leaves_it(play):
    for engine, tokens in (("vllm", 400), ("trtllm", 400), ("vllm-v0", 396), ("sglang", 394)):
        spec = cluster(engine, num_blocks=100, budget=512)
        assert spec.types[0].capacity_tokens(spec.block_size) == tokens
        played = play(spec, toy_episode([(0, tokens - 1, 2)]), {})
        assert played.outcomes["finish_s"][0] > 0
        with pytest.raises(ConfigError, match=f"the largest replica holds {tokens}"):
            toy_episode([(0, tokens, 2)]).validate(spec)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_that_compute_prompts_whole_refuse_those_beyond_their_budget(engine):
    spec = cluster(engine, budget=8)
    episode = toy_episode([(0, 8, 2)])
    if engine in ("vllm", "vllm-priority", "sglang"):
        episode.validate(spec)
        return
    with pytest.raises(ConfigError, match=r"whole prompts.* must cover .* \(9 tokens\)"):
        episode.validate(spec)


def test_a_prompt_alone_must_fit_where_nothing_is_ever_computed_anew(play):
    spec = cluster("trtllm", budget=8)
    spec = replace(spec, types=(replace(spec.types[0], computes_once=True),))
    # prefill 8: 1.8; decodes over 9 and 10 tokens, so that the request grows beyond the budget
    played = play(spec, toy_episode([(0, 8, 3)]), {})
    assert_times(played, finish_s=[1.8 + 1.109 + 1.11])
    with pytest.raises(ConfigError, match=r"must cover the longest prompt \(9 tokens\)"):
        toy_episode([(0, 9, 1)]).validate(spec)
    failing = toy_episode([(0, 8, 3)], faults=[(9, 0, FAULT_DOWN, 0), (10, 0, FAULT_UP, 0)])
    with pytest.raises(ConfigError, match=r"must cover the longest request \(10 tokens\)"):
        failing.validate(spec)
    with pytest.raises(ConfigError, match="engine vllm computes requests anew"):
        replace(spec.types[0], engine="vllm")


def test_an_unknown_engine_is_refused():
    with pytest.raises(ConfigError, match=r"unknown engine 'sglan': .*did you mean sglang"):
        cluster("sglan")


def test_sglang_needs_chunks_of_a_block():
    with pytest.raises(ConfigError, match=r"of sglang \(8\) must be at least block_size \(16\)"):
        cluster("sglang", budget=8, block_size=16)
