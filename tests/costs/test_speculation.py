"""What drafting and verifying cost, against the costs they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.costs.shared import SharedCost
from servegym.costs.speculation import Speculation, shared_with_drafts, with_drafter
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import Uncertainty, World

RATES = (0.8, 0.6, 0.4)


@pytest.fixture(scope="module")
def cost() -> StepCost:
    return StepCost(gpu("H100-SXM-80GB"), model("Llama-3.1-8B"))


@pytest.fixture(scope="module")
def drafts(cost: StepCost) -> Speculation:
    return Speculation.of(cost, RATES, 2048)


def of_kv(batch: int) -> list[tuple[int, int]]:
    """Sequences with three drafts each, over 1,000 tokens of which four are new."""
    return [(4, 996)] * batch


def test_a_step_is_one_more_layer_over_all_tokens_and_passes_of_the_drafter(cost, drafts):
    # 32 sequences with 3 drafts: 128 tokens through 33 layers, then two passes of one layer over
    # 32 tokens, and the output head for each draft; joining hidden states to embeddings is 3
    # products of 4,096 x 8,192
    whole = with_drafter(cost)
    one = StepCost(cost.gpu, cost.model.model_copy(update={"layers": 1}))
    verify_s = whole.terms(128.0)
    attend_s = whole.decode_s(32, 32000.0, mixed=False, queries=4)
    passes_s = 2 * (one.dense_s(32.0) + one.decode_s(32, 32000.0, mixed=False))
    joining_s = cost.operators.gemm_s(128.0, 4096, 8192, 2.0)
    joining_s += 2 * cost.operators.gemm_s(32.0, 4096, 8192, 2.0)
    head_s = cost.terms(32.0)["output head"]
    want = sum(verify_s.values()) + attend_s + passes_s + joining_s + head_s
    assert drafts.step_s([], of_kv(32)) == pytest.approx(want, rel=0.02)


def test_a_prefill_pays_for_the_layer_and_its_first_drafts(cost, drafts):
    whole = with_drafter(cost)
    plain_s = sum(whole.terms(512.0, chunk=512.0).values())
    got_s = drafts.step_s([(512, 0)], [])
    assert plain_s < got_s < 1.2 * plain_s
    assert drafts.step_s([(512, 0)], of_kv(32)) > got_s


def test_queries_of_a_sequence_read_its_keys_once(cost):
    # with enough tokens attention is bound by memory: four queries a sequence cost no four times
    one_s = cost.decode_s(64, 256_000.0, mixed=False)
    four_s = cost.decode_s(64, 256_000.0, mixed=False, queries=4)
    assert one_s <= four_s < 1.5 * one_s


def test_queries_over_latents_are_more_heads_and_more_tokens_to_absorb():
    deepseek = StepCost(gpu("H200-SXM-141GB"), model("DeepSeek-V3"), tp=8, fp8=True)
    heads = deepseek.shard.latent_heads
    op = deepseek.operators
    four_s = op.latent_decode_s(64, 256_000.0, heads, queries=4)
    one_s = op.latent_decode_s(64, 256_000.0, heads)
    assert one_s < four_s < 4 * one_s
    # what does not depend on how much is attended to: the absorption, of as many tokens
    few = [op.latent_decode_s(batch, 1.0, heads, queries=q) for batch, q in ((64, 1), (16, 4))]
    assert few[1] == pytest.approx(few[0], rel=0.25)


def test_ranks_share_the_experts_of_the_drafter_as_well():
    deepseek = StepCost(gpu("H200-SXM-141GB"), model("DeepSeek-V3"), fp8=True)
    whole = Speculation.of(deepseek, (0.8,), 2048)
    own = Speculation.of(deepseek, (0.8,), 2048, experts=False)
    experts_s = with_drafter(deepseek).terms(128.0)["experts"]
    assert whole.steps.dense(128.0) - own.steps.dense(128.0) == pytest.approx(experts_s, rel=0.02)
    plain = SharedCost.of(deepseek, 8, 256)
    one, three = (shared_with_drafts(deepseek, k, 8, 256) for k in (1, 3))
    # 58 of DeepSeek's 61 layers have experts, and so has the drafter; all have an exchange
    np.testing.assert_allclose(one.experts_s, plain.experts_s * 59 / 58, rtol=1e-9)
    np.testing.assert_allclose(one.exchange_s, plain.exchange_s * 62 / 61, rtol=1e-9)
    # two passes more over a quarter of the tokens
    i = int(np.searchsorted(plain.tokens, 4096))
    quarter_s = np.interp(plain.tokens[i] / 4, plain.tokens, plain.exchange_s) / 61
    assert three.exchange_s[i] == pytest.approx(one.exchange_s[i] + 2 * quarter_s, rel=1e-9)
    assert one.largest_graph == three.largest_graph == 512


def test_the_drafter_takes_memory_for_its_layer_and_its_keys(cost):
    whole = with_drafter(cost)
    layer = (cost.model.num_params - 2 * cost.model.vocab * cost.model.hidden) / 32
    more = whole.model.num_params - cost.model.num_params
    assert more == pytest.approx(layer + 2 * 4096 * 4096, rel=0.01)
    assert whole.kv_token_bytes == cost.kv_token_bytes * 33 / 32
    assert whole.kv_capacity_tokens(0.9) < cost.kv_capacity_tokens(0.9) * 32 / 33


def test_an_engine_without_drafts_that_is_as_fast_says_what_a_token_takes(drafts):
    assert drafts.mean_tokens == pytest.approx(2.8)
    alike = drafts.per_token(256)
    for batch in (1, 8, 64, 200):
        want = drafts.step_s([], of_kv(batch)) / 2.8
        assert alike.step_s([], batch, 1000 * batch) == pytest.approx(want, rel=0.02)
    # prompts are longer than what decodes together: they take what they take, without the heads
    want = drafts.step_s([(1024, 0)], [])
    assert alike.step_s([(1024, 0)]) == pytest.approx(want, rel=0.1)


def test_drafts_are_worth_the_more_the_fewer_decode(cost, drafts):
    grid = cost.compile(2048)
    gains = [
        grid.step_s([], batch, 1000 * batch) / drafts.step_s([], of_kv(batch)) * drafts.mean_tokens
        for batch in (1, 64, 256)
    ]
    assert gains == sorted(gains, reverse=True)
    assert 1.8 < gains[0] < 2.8


def test_a_world_moves_drafts_with_the_step(cost, drafts):
    doubt = Uncertainty.of("H100-SXM-80GB", cost, drafts.steps)
    off = doubt.speculation_in_world(drafts, World(7))
    factor = doubt.factors(World(7))
    np.testing.assert_allclose(off.steps.decode_s, factor["decode"] * drafts.steps.decode_s)
    ratio = off.draft_s / drafts.draft_s
    assert not np.allclose(ratio, 1.0)
    dense = off.steps.dense_s / drafts.steps.dense_s
    assert dense.min() * 0.999 <= ratio.min() <= ratio.max() <= dense.max() * 1.001


def test_slower_drafts_are_slower_in_all_they_do(drafts):
    slow = drafts.slower(2.0)
    chunks, decodes = [(100, 50)], of_kv(7)
    assert slow.step_s(chunks, decodes) == pytest.approx(2.0 * drafts.step_s(chunks, decodes))
