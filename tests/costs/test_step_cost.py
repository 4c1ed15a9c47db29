"""The cost of a step: by hand, monotonic, bounded by the data sheet, split over GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from servegym.assets.specs import (
    AllReduceFit,
    GpuSpec,
    KernelFit,
    ModelSpec,
    gpu,
    gpu_names,
    model,
    model_names,
)
from servegym.costs.roofline import RooflineSource
from servegym.costs.step import StepCost
from servegym.errors import ConfigError

# Moves 1 byte in 1 ns and computes for nothing, so that a step's time counts its bytes.
PERFECT = KernelFit(c0_s=0.0, eff_flops=1.0, eff_bytes=1.0, p=1.0)
BYTE_COUNTER = GpuSpec(
    bf16_flops=1e30,
    memory_bytes=10e9,
    memory_bytes_per_s=1e9,
    price_usd_per_h=1.0,
    source="made up",
    price_source="made up",
    gemm=PERFECT,
    prefill=PERFECT,
    decode=KernelFit(c0_s=5e-9, eff_bytes=1.0),
    elementwise=PERFECT,
    all_reduce={2: AllReduceFit(alpha_s=0.0, bus_bytes_per_s=1e9, p=1.0)},
)
DENSE = ModelSpec(
    layers=2,
    hidden=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    ffn_dim=16,
    num_experts=0,
    active_experts=0,
    expert_ffn_dim=0,
    vocab=32,
    ffn_matrices=3,
    kv_bytes_per_token=4 * 2 * 2 * 2,
    num_params=1e9,
    source="made up",
)
EXPERTS = DENSE.model_copy(update={"num_experts": 4, "active_experts": 1, "expert_ffn_dim": 16})
NS = 1e-9


def toy(spec=DENSE, tp=1):
    return StepCost(BYTE_COUNTER, spec, tp, source=RooflineSource(BYTE_COUNTER, cpu_overhead_s=0.0))


# ---- by hand ----


def test_the_terms_of_one_decode_count_its_bytes():
    # a GEMM of one token moves 2 (n k + k) + 2 n bytes; two layers, one head
    terms = toy().terms(1, batch=1, kv_tokens=10)
    assert terms == pytest.approx(
        {
            "cpu": 0.0,
            # QKV n = (4 + 2 * 2) * 2 = 16, k = 8: 304; out n = 8, k = 8: 160
            "attention GEMMs": 2 * (304 + 160) * NS,
            # gate and up n = 32, k = 8: 592; down n = 8, k = 16: 304
            "MLP": 2 * (592 + 304) * NS,
            # two norms 4 * 8 elements each, Q and K 2 * 12, gate, up and product 3 * 16
            "norms, activation": 2 * 2 * (64 + 24 + 48) * NS,
            "all-reduce": 0.0,
            "output head": 592 * NS,  # n = 32, k = 8
            "attention launch": 2 * 5 * NS,
            "prefill attention": 0.0,
            "decode attention": 2 * (4 * 2 * 2 * 10) * NS,  # K and V of 10 tokens
        }
    )


def test_two_gpus_share_heads_and_ffn_and_add_two_all_reduces_a_layer():
    terms = toy(tp=2).terms(1)
    # QKV n = (2 + 2 * 1) * 2 = 8, k = 8: 160; out n = 8, k = 4: 2 * (32 + 4) + 16 = 88
    assert terms["attention GEMMs"] == pytest.approx(2 * (160 + 88) * NS)
    # gate and up n = 16, k = 8: 304; down n = 8, k = 8: 160
    assert terms["MLP"] == pytest.approx(2 * (304 + 160) * NS)
    # 16 bytes of one token, 2 * 1/2 of them over the bus, twice a layer
    assert terms["all-reduce"] == pytest.approx(2 * 2 * 16 * NS)


def test_one_token_touches_its_active_experts_alone():
    # one expert: as the dense MLP of the same width
    assert toy(EXPERTS).terms(1)["experts"] == pytest.approx(toy().terms(1)["MLP"])


def test_two_tokens_touch_as_many_experts_as_uniform_routing_does():
    # 2 tokens on 4 experts: 4 (1 - (3/4)^2) = 1.75 distinct ones with 8/7 tokens each
    # one expert: 2 (32 * 8 + 8/7 * 8) + 2 * 8/7 * 32 and 2 (8 * 16 + 8/7 * 16) + 2 * 8/7 * 8
    rows = 8 / 7
    one = 2 * (256 + rows * 8) + 2 * rows * 32 + 2 * (128 + rows * 16) + 2 * rows * 8
    assert toy(EXPERTS).terms(2)["experts"] == pytest.approx(2 * 1.75 * one * NS, rel=1e-6)


def test_a_mixture_pays_its_router():
    # n = 4 experts, k = 8: 2 (32 + 8) + 2 * 4 bytes in each of two layers
    assert toy(EXPERTS).terms(1)["router"] == pytest.approx(2 * 88 * NS)


def test_layers_with_a_window_read_that_many_tokens():
    windowed = DENSE.model_copy(update={"window_tokens": 4, "window_layers": 1})
    # K and V of 16 bytes a token: 10 in one layer, in the other 4 of the one sequence
    assert toy(windowed).terms(1, batch=1, kv_tokens=10)["decode attention"] == pytest.approx(
        16 * (10 + 4) * NS
    )


def test_a_window_keeps_the_pairs_of_a_long_prompt_to_its_width():
    # compute alone: 1 ns a pair and head; one layer of two sees 4 tokens before each query
    flops_counter = BYTE_COUNTER.model_copy(
        update={"bf16_flops": 4 * 2 * 4 * 1e9, "memory_bytes_per_s": 1e30}
    )
    windowed = DENSE.model_copy(update={"window_tokens": 4, "window_layers": 1})
    cost = StepCost(flops_counter, windowed, source=RooflineSource(flops_counter))
    whole = 100 * 101 / 2
    blocks = 25 * (4 * 2 + 4 * 5 / 2)  # 25 blocks of 4 queries: 2 before and the triangle
    assert cost.terms(100, chunk=100)["prefill attention"] == pytest.approx((whole + blocks) * NS)


#: 6 elements of latent, 2 of rotary key; queries from 3 compressed elements.
LATENT = DENSE.model_copy(
    update={
        "kv_heads": 1,
        "latent_dim": 6,
        "latent_rope_dim": 2,
        "latent_query_dim": 3,
        "kv_bytes_per_token": 2 * 2 * 8,
    }
)


@pytest.mark.parametrize("tp", [1, 2])
def test_latent_attention_reads_one_latent_a_token_on_every_gpu(tp):
    heads = 4 / tp
    # 2 bytes of 6 + 2 elements of 100 tokens; per head the query's 8 elements, the result's 6
    attention = 2 * 8 * 100 + 2 * heads * (8 + 6)
    # two products with 2 x 6 weights a head, from 2 elements to 6 and back
    absorption = 2 * heads * 2 * (12 + 2 + 6)
    terms = toy(LATENT, tp).terms(1, batch=1, kv_tokens=100)
    # its launch is the term of all attention
    assert terms["decode attention"] == pytest.approx(2 * (attention + absorption) * NS, rel=1e-3)
    assert toy(LATENT, tp).status == "extrapolated"


@pytest.mark.parametrize("tp", [1, 2])
def test_latents_are_computed_on_every_gpu_and_heads_once(tp):
    heads = 4 // tp
    # latents n = 3 + 6 + 2, k = 8; query n = 4 a head, k = 3; out n = 8, k = 2 a head
    one = 2 * (88 + 8) + 22 + 2 * (4 * heads * 3 + 3) + 2 * 4 * heads
    one += 2 * (8 * 2 * heads + 2 * heads) + 16
    terms = toy(LATENT, tp).terms(1)
    assert terms["attention GEMMs"] == pytest.approx(2 * one * NS)


def test_prompts_expand_the_latents_of_all_they_attend_to():
    # n = 2 * 2 a head, k = 6, of 4 new tokens over 16: weights, latents, keys and values
    expansion = 2 * 16 * 6 + 2 * 20 * 6 + 2 * 20 * 16
    # keys of 4 and values of 2 elements of 20 tokens; queries and results of 4: 4 heads
    attention = 2 * 6 * 20 * 4 + 2 * 6 * 4 * 4
    terms = toy(LATENT).terms(4, chunk=4, context=16)
    assert terms["prefill attention"] == pytest.approx(2 * (expansion + attention) * NS, rel=0.01)


def test_latents_are_cached_on_every_gpu():
    # 0.9 * 10 GB - 2 GB of weights - 1.7 GB: 5.3 GB of 32 bytes
    assert toy(LATENT).kv_capacity_tokens() == 165_625_000
    # as many bytes on each of two: half the weights and the copied projections to latents
    copied = 2 * 2 * 8 * 11
    free = (2 * 9e9 - 2e9 - copied - 2 * 1.7e9) / 2
    assert toy(LATENT, 2).kv_capacity_tokens() == int(free / 32)
    eight_bits = replace(toy(LATENT), fp8_kv=True)
    assert eight_bits.kv_capacity_tokens() == 2 * 165_625_000


def test_a_mixture_may_have_dense_layers_and_shared_experts():
    mixed = EXPERTS.model_copy(update={"dense_layers": 1, "shared_ffn_dim": 4})
    terms = toy(mixed).terms(1)
    # one layer of two has experts, as wide as the dense FFN of the other
    assert terms["experts"] == pytest.approx(toy(EXPERTS).terms(1)["experts"] / 2)
    assert terms["MLP"] == pytest.approx(toy().terms(1)["MLP"] / 2)
    assert terms["router"] == pytest.approx(toy(EXPERTS).terms(1)["router"] / 2)
    # beside the routed ones they read 8 x 8 and 8 x 4 weights
    assert terms["shared experts"] == pytest.approx(2 * (64 + 32) * NS)
    # alone: gate and up n = 8, k = 8: 2 (64 + 300 * 8) + 2 * 300 * 8; down n = 8, k = 4
    one = 2 * (64 + 300 * 8) + 2 * 300 * 8 + 2 * (32 + 300 * 4) + 2 * 300 * 8
    assert toy(mixed).terms(300)["shared experts"] == pytest.approx(one * NS)
    # an expert has 3 * 8 * 16 weights
    assert mixed.expert_params == 4 * 384


def test_an_fp4_checkpoint_may_keep_parts_in_16_bits():
    kept = EXPERTS.model_copy(update={"fp4_16bit": ("projections", "head")})
    four, some = (StepCost(BYTE_COUNTER, spec, fp4=True) for spec in (EXPERTS, kept))
    # QKV 16 x 8 in two layers and the head 32 x 8 take 2 bytes a weight in place of 0.5625
    more = (2 * 16 * 8 + 32 * 8) * (2 - 0.5625)
    assert some.all_weight_bytes - four.all_weight_bytes == pytest.approx(more)
    assert some.terms(1)["experts"] == four.terms(1)["experts"]
    assert some.terms(1)["output head"] > four.terms(1)["output head"]
    assert {e.operator for e in some.evidence} >= {"GEMM 16 x 8 bf16", "GEMM 8 x 8 fp4"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_layers": 1}, "are for mixtures"),
        ({"num_experts": 4, "dense_layers": 2}, "from 0 to 1, got 2"),
        ({"active_experts": 1}, "1 active experts of 0"),
        ({"latent_dim": 8, "latent_rope_dim": 2}, "kv_heads 1"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        ModelSpec.model_validate(DENSE.model_dump() | change)


def test_kv_heads_that_gpus_cannot_share_are_refused():
    three = DENSE.model_copy(update={"heads": 6, "kv_heads": 3})
    with pytest.raises(ConfigError, match="divide the 3 KV heads or be a multiple of them, got 2"):
        toy(three, 2)


def test_fp4_weights_take_half_a_byte_and_their_scale():
    fp4 = StepCost(BYTE_COUNTER, DENSE, fp4=True)
    # 0.9 * 10 GB - 0.5625 GB - 1.7 GB of 32 bytes
    assert fp4.kv_capacity_tokens() == int((9e9 - 0.5625e9 - 1.7e9) / 32)
    assert fp4.status == "extrapolated"
    with pytest.raises(ConfigError, match="fp8 or fp4, not both"):
        StepCost(BYTE_COUNTER.model_copy(update={"fp8_flops": 1e30}), DENSE, fp8=True, fp4=True)


def test_the_output_head_sees_one_row_a_sequence_at_most():
    long, longer = (toy().terms(tokens)["output head"] for tokens in (256, 4096))
    assert long == longer


def test_capacity_is_what_weights_and_reserve_leave():
    # 0.9 * 10 GB - 2 GB of weights - 1.7 GB = 5.3 GB of 32 bytes
    assert toy().kv_capacity_tokens(0.9) == 165_625_000
    # fp8 halves the weights: 6.3 GB
    fp8 = StepCost(BYTE_COUNTER.model_copy(update={"fp8_flops": 1e30}), DENSE, fp8=True)
    assert fp8.kv_capacity_tokens(0.9) == 196_875_000


#: GPU, model, share of memory, KV tokens, source.
MEASURED = [
    (
        "RTX-4090",
        "Llama-3.1-8B",
        0.9,
        41_408,
        "vLLM 0.19.0 with 2,048 tokens a step: num_kv_tokens in the record of LLMServingSim's run",
    ),
]


@pytest.mark.parametrize(("gpu_name", "model_name", "share", "tokens", "source"), MEASURED)
def test_capacity_is_what_an_engine_reported(gpu_name, model_name, share, tokens, source):
    cost = StepCost(gpu(gpu_name), model(model_name))
    assert cost.kv_capacity_tokens(share) == pytest.approx(tokens, rel=0.05), source


# ---- laws ----

EVERY_MODEL = {name: StepCost(gpu("H200-SXM-141GB"), model(name), 2) for name in model_names()}


@pytest.mark.parametrize("name", model_names())
@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 8192), more=st.integers(1, 512))
def test_more_tokens_take_longer(name, tokens, more):
    cost = EVERY_MODEL[name]
    assert cost.dense_s(tokens + more) >= cost.dense_s(tokens)


@pytest.mark.parametrize("name", model_names())
@settings(max_examples=40, deadline=None)
@given(chunk=st.integers(1, 4096), context=st.integers(0, 100_000), more=st.integers(1, 512))
def test_more_prompt_and_more_context_take_longer(name, chunk, context, more):
    cost = EVERY_MODEL[name]

    def prefill_s(chunk, context):
        return cost.terms(chunk, chunk=chunk, context=context)["prefill attention"]

    assert prefill_s(4 * chunk + 512, context) > prefill_s(chunk, context)
    assert prefill_s(chunk + more, context) >= prefill_s(chunk, context) * (1 - 1e-9)
    assert prefill_s(chunk, context + more) >= prefill_s(chunk, context) * (1 - 1e-9)


@pytest.mark.parametrize("name", model_names())
@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 512), kv=st.integers(1, 10**6), more=st.integers(1, 512))
def test_more_sequences_and_more_kv_take_longer(name, batch, kv, more):
    cost = EVERY_MODEL[name]

    def decode_s(batch, kv):
        return cost.terms(batch, batch=batch, kv_tokens=kv)["decode attention"]

    assert decode_s(4 * batch, 4 * kv + 2**20) > decode_s(batch, kv)
    if not model(name).latent_dim:  # whose kernels take shorter sequences faster
        assert decode_s(batch + more, kv) >= decode_s(batch, kv) * (1 - 1e-9)
    assert decode_s(batch, kv + more) >= decode_s(batch, kv) * (1 - 1e-9)


@pytest.mark.parametrize("gpu_name", gpu_names())
@pytest.mark.parametrize("model_name", ["Llama-3.1-8B", "Llama-2-7B", "Qwen3-32B", "Qwen2.5-72B"])
@pytest.mark.parametrize("tokens", [1, 64, 2048])
def test_no_step_beats_the_data_sheet(gpu_name, model_name, tokens):
    spec, arch = gpu(gpu_name), model(model_name)
    block_params = arch.num_params - 2 * arch.vocab * arch.hidden  # without embedding and head
    for tp in (1, *spec.all_reduce):
        if arch.heads % tp:
            continue
        step_s = StepCost(spec, arch, tp).dense_s(tokens)
        assert step_s >= 2 * tokens * block_params / (tp * spec.bf16_flops) * 0.999
        assert step_s >= 2 * block_params / (tp * spec.memory_bytes_per_s) * 0.999


@pytest.mark.parametrize("name", model_names())
def test_two_gpus_halve_the_time_of_a_large_mlp(name):
    # at 8192 tokens launches no longer count, and every GPU has half of every matrix
    term = "experts" if model(name).num_experts else "MLP"
    one, two = (StepCost(gpu("H200-SXM-141GB"), model(name), tp).terms(8192)[term] for tp in (1, 2))
    if model(name).num_experts:  # half as wide experts reach less of the FLOP rate
        assert 1.3 < one / two < 2.3
    else:
        assert one / two == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("name", ["H100-SXM-80GB", "A100-SXM-80GB", "B200-SXM-180GB"])
def test_gpus_on_a_fast_bus_shorten_a_large_step(name):
    steps = [StepCost(gpu(name), model("Llama-3.1-70B"), tp).dense_s(2048) for tp in (1, 2, 4, 8)]
    assert steps == sorted(steps, reverse=True)


# ---- every GPU with every model ----


def combinations():
    return [(g, m) for g in gpu_names() for m in model_names()]


@pytest.mark.parametrize(("gpu_name", "model_name"), combinations())
def test_a_gpu_holds_a_model_or_says_what_to_do(gpu_name, model_name):
    spec, arch = gpu(gpu_name), model(model_name)
    for tp in (1, *spec.all_reduce):
        if arch.heads % tp:
            with pytest.raises(ConfigError, match=f"tp must divide the {arch.heads} heads"):
                StepCost(spec, arch, tp)
            continue
        if arch.kv_heads % tp and tp % arch.kv_heads:
            with pytest.raises(ConfigError, match=f"tp must divide the {arch.kv_heads} KV heads"):
                StepCost(spec, arch, tp)
            continue
        copied = 0  # every GPU makes the latents
        if arch.latent_dim:
            width = arch.latent_query_dim + arch.latent_dim + arch.latent_rope_dim
            copied = (tp - 1) * arch.layers * arch.hidden * width
        for fp8 in (False, True) if spec.fp8_flops else (False,):
            cost = StepCost(spec, arch, tp, fp8)
            weights = (1 if fp8 else 2) * (arch.num_params + copied)
            free = tp * (0.9 * spec.memory_bytes - 1.7e9) - weights
            if free <= 0:
                with pytest.raises(ConfigError, match="do not fit"):
                    cost.kv_capacity_tokens()
                continue
            tokens = cost.kv_capacity_tokens()
            # more than one long conversation where the weights leave a GB for it, less than an
            # empty machine could hold
            least = 4096 if free > 1e9 else 0
            assert least < tokens < tp * spec.memory_bytes / arch.kv_bytes_per_token
            assert tokens * arch.kv_bytes_per_token <= free


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        (name, tp)
        for name in model_names()
        for tp in (1, 2, 4, 8)
        if model(name).heads % tp == 0 and 2 * model(name).num_params < tp * 120e9
        if model(name).kv_heads % tp == 0 or tp % model(name).kv_heads == 0
    ],
)
def test_gpus_beyond_the_kv_heads_hold_copies_of_them(name, tp):
    spec, arch = gpu("H200-SXM-141GB"), model(name)
    free = 0.9 * spec.memory_bytes - 1.7e9 - 2 * arch.num_params / tp
    # each GPU caches K and V of its share of the heads, and of one head at least
    per_gpu = 2 * 2 * arch.layers * max(1, arch.kv_heads // tp) * arch.head_dim
    assert StepCost(spec, arch, tp).kv_capacity_tokens() == pytest.approx(free / per_gpu, abs=1)


# ---- wrong input ----


@pytest.mark.parametrize("tp", [0, -1, 3])
def test_a_degree_that_does_not_divide_the_heads_is_refused(tp):
    with pytest.raises(ConfigError, match=f"tp must divide the 4 heads, got {tp}"):
        StepCost(BYTE_COUNTER, DENSE, tp)


def test_a_degree_without_collectives_is_refused():
    with pytest.raises(ConfigError, match=r"choose tp from \[1, 2\]"):
        StepCost(gpu("A40"), model("Llama-3.1-8B"), 4)


@pytest.mark.parametrize("name", [n for n in gpu_names() if not gpu(n).fp8_flops])
def test_fp8_without_units_is_refused(name):
    with pytest.raises(ConfigError, match="no fp8 units"):
        StepCost(gpu(name), model("Llama-3.1-8B"), fp8=True)


def test_decodes_cost_more_beside_a_chunk_where_that_was_measured_and_only_there():
    shape = {"tokens": 1064, "batch": 64, "kv_tokens": 65536}
    for name, dearer in (("RTX-PRO-6000", True), ("A100-SXM-80GB", True), ("H100-SXM-80GB", False)):
        cost = StepCost(gpu(name), model("Llama-3.1-8B"))
        alone, beside = (cost.terms(**shape, chunk=c)["decode attention"] for c in (0, 1000))
        assert (beside > 1.3 * alone) if dearer else beside == alone
        grid = cost.compile()
        tiles = 1000 * 64 * grid.empty_tiles_s
        assert (tiles > 0) == (name == "RTX-PRO-6000")  # a prior leaves them out
        assert grid.mixed(64, 65536) + tiles == pytest.approx(beside, rel=0.05)
        assert grid.decode(64, 65536) == pytest.approx(alone, rel=0.05)


def test_a_layer_with_parallel_ffn_reduces_once():
    for two in (1, 2):
        twice = StepCost(BYTE_COUNTER, DENSE, two).terms(3)
        once = StepCost(BYTE_COUNTER, DENSE.model_copy(update={"parallel_ffn": True}), two).terms(3)
        assert once["all-reduce"] == twice["all-reduce"] / 2
        assert {k: v for k, v in once.items() if k != "all-reduce"} == {
            k: v for k, v in twice.items() if k != "all-reduce"
        }


def test_a_checkpoint_with_fp4_experts_keeps_the_rest_in_16_bits():
    arch = model("gpt-oss-120b")
    spec = gpu("B200-SXM-180GB")
    whole = StepCost(spec, arch.model_copy(update={"fp4_experts_only": False}), fp4=True)
    experts_only, wide = StepCost(spec, arch, fp4=True), StepCost(spec, arch)
    for term in ("attention GEMMs", "output head"):
        assert experts_only.terms(64)[term] == wide.terms(64)[term]
        assert experts_only.terms(64)[term] != whole.terms(64)[term]
    # which experts a token goes to is always computed in 16 bits
    for cost in (experts_only, whole):
        assert cost.terms(64)["router"] == wide.terms(64)["router"]
    assert experts_only.terms(64)["experts"] == whole.terms(64)["experts"]
    # 2.1e9 of its 116.8e9 parameters are no experts
    extra = experts_only.all_weight_bytes - whole.all_weight_bytes
    assert extra == pytest.approx((2.0 - 0.5625) * 2.1e9, rel=0.05)
