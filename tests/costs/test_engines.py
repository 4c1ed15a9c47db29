"""Tests of costs by engine and number format."""

import pytest

from servegym.assets.specs import gpu, model
from servegym.costs.formats import FORMATS, number_format
from servegym.costs.step import StepCost
from servegym.errors import ConfigError
from servegym.scenario.fleet import FleetEntry, step_cost

H200, B200 = gpu("H200-SXM-141GB"), gpu("B200-SXM-180GB")
LLAMA_70B, LLAMA_8B = model("Llama-3.1-70B"), model("Llama-3.1-8B")
MIXTURE = model("gpt-oss-120b")
DECODE = {"tokens": 8, "batch": 8, "kv_tokens": 16384}


def step_s(cost: StepCost) -> float:
    return sum(cost.terms(**DECODE).values())


def test_vllms_kernels_are_the_fits_of_the_gpu():
    assert H200.of("vllm") is H200
    assert StepCost(H200, LLAMA_8B, engine="vllm").operators.gpu is H200


def test_an_engine_without_fits_on_a_gpu_has_those_of_vllm():
    l4 = gpu("L4")
    assert l4.of("sglang").decode == l4.decode
    assert l4.of("sglang").all_reduce == l4.all_reduce


def test_an_engines_own_kernels_take_the_place_of_vllms():
    own = H200.of("trtllm")
    assert own.decode != H200.decode
    assert own.all_reduce[4] != H200.all_reduce[4]
    assert own.gemm == H200.gemm
    assert own.of("trtllm") is own


def test_tensorrt_llm_pays_a_norm_within_an_all_reduce_once():
    alone, four = (
        StepCost(H200, LLAMA_70B, tp, fp8=True, engine="trtllm", scales="static") for tp in (1, 4)
    )
    # on one GPU there is no all-reduce to hold norms and casts
    assert alone.terms(**DECODE)["casts"] > 0
    assert four.terms(**DECODE)["casts"] == 0
    norms = [cost.terms(**DECODE)["norms, activation"] for cost in (alone, four)]
    assert norms[1] < norms[0] - 1.9 * LLAMA_70B.layers * four.operators.one_elementwise_s()


def test_small_models_keep_their_norms_apart_in_tensorrt_llm():
    cost = StepCost(H200, LLAMA_8B, 4, fp8=True, engine="trtllm", scales="static")
    assert cost.terms(**DECODE)["casts"] > 0


def test_static_scales_save_the_quantisation_in_gemms():
    dynamic = StepCost(H200, LLAMA_70B, 4, fp8=True, engine="trtllm")
    static = StepCost(H200, LLAMA_70B, 4, fp8=True, engine="trtllm", scales="static")
    saved = dynamic.terms(**DECODE)["MLP"] - static.terms(**DECODE)["MLP"]
    # casts take microseconds: two a layer
    assert 2e-6 < saved / LLAMA_70B.layers < 12e-6


def test_sglang_casts_before_every_gemm_with_static_scales():
    casts = {
        engine: StepCost(H200, LLAMA_8B, fp8=True, engine=engine, scales="static").terms(**DECODE)[
            "casts"
        ]
        for engine in ("vllm", "sglang")
    }
    assert casts["sglang"] == pytest.approx(4 * casts["vllm"], rel=0.1)


def test_an_8_bit_cache_holds_twice_the_tokens_and_is_read_in_about_half_the_time():
    wide, narrow = (StepCost(B200, LLAMA_8B, fp8_kv=fp8_kv) for fp8_kv in (False, True))
    assert narrow.kv_capacity_tokens() == pytest.approx(2 * wide.kv_capacity_tokens(), rel=1e-4)
    long = {"tokens": 64, "batch": 64, "kv_tokens": 64 * 16384}
    ratio = narrow.terms(**long)["decode attention"] / wide.terms(**long)["decode attention"]
    assert 0.45 < ratio < 0.65


def test_queries_and_keys_with_norms_take_a_kernel_more():
    plain = model("Qwen3-8B").model_copy(update={"qk_norm": False})
    costs = [StepCost(H200, spec) for spec in (model("Qwen3-8B"), plain)]
    more = step_s(costs[0]) - step_s(costs[1])
    assert more == pytest.approx(plain.layers * costs[0].operators.one_elementwise_s(), rel=0.05)


def test_groups_of_experts_hold_the_same_weights_and_wait_for_the_fullest():
    whole, split = (StepCost(H200, MIXTURE, 4, fp4=True, expert_groups=n) for n in (1, 4))
    assert split.all_weight_bytes == whole.all_weight_bytes
    few, many = ({"tokens": n} for n in (4, 4096))
    # few tokens fall unevenly; of many, wider experts are the better GEMMs
    assert split.terms(**few)["experts"] > whole.terms(**few)["experts"]
    assert split.terms(**many)["experts"] < 1.1 * whole.terms(**many)["experts"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"engine": "tgi"}, "engine"),
        ({"scales": "static"}, "choose precision fp8"),
        ({"expert_groups": 3, "tp": 4}, "expert_groups must divide tp 4"),
        ({"expert_groups": 0}, "expert_groups"),
    ],
)
def test_what_cannot_be_is_refused(choice, message):
    with pytest.raises(ConfigError, match=message):
        StepCost(H200, MIXTURE, **choice)


def test_number_formats_have_names():
    assert number_format("fp8-block") == (True, False, "block")
    for name in FORMATS:
        weights = number_format(name)
        cost = StepCost(B200, LLAMA_8B, fp8=weights.fp8, fp4=weights.fp4, scales=weights.scales)
        assert cost.validated, name
    with pytest.raises(ConfigError, match="fp8-static"):
        number_format("fp8static")


def test_a_fleet_entry_and_the_precision_of_a_scenario_choose_kernels():
    def cost(precision, engine="vllm"):
        entry = FleetEntry(gpu="H200-SXM-141GB", tp=4, engine=engine)
        return step_cost(entry, "Llama-3.1-70B", precision)

    dynamic, static = cost("fp8"), cost("fp8-static", "trtllm")
    assert (dynamic.engine, dynamic.scales) == ("vllm", "dynamic")
    assert (static.engine, static.scales) == ("trtllm", "static")
    assert step_s(static) < 0.95 * step_s(dynamic)
    entry = FleetEntry(gpu="H200-SXM-141GB", calibration="mine.json")
    with pytest.raises(ConfigError, match="for precision bf16 or fp8, not fp8-block"):
        step_cost(entry, "Llama-3.1-70B", "fp8-block")


@pytest.mark.parametrize("name", ["H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"])
def test_experts_in_fp8_are_those_of_the_engine(name):
    def experts_s(engine):
        spec = model("DeepSeek-V3")
        cost = StepCost(gpu(name), spec, 8, fp8=True, engine=engine, scales="block")
        return cost.terms(4096)["experts"]

    times = {engine: experts_s(engine) for engine in ("vllm", "sglang", "trtllm")}
    assert times["sglang"] < times["vllm"]
    if name == "B200-SXM-180GB":  # both call TensorRT-LLM's generated kernels
        assert times["trtllm"] == times["sglang"]
    else:  # CUTLASS
        assert times["trtllm"] > 1.3 * times["vllm"]


def test_vllms_attention_is_a_prior_for_an_engine_that_was_not_measured():
    borrowed = {e.kind for e in StepCost(gpu("L4"), LLAMA_8B, engine="sglang").evidence}
    assert "prior" in borrowed
    kinds = {
        engine: {
            e.kind
            for e in StepCost(B200, LLAMA_8B, engine=engine).evidence
            if "attention" in e.operator
        }
        for engine in ("vllm", "trtllm", "sglang")
    }
    assert kinds == {"vllm": {"interpolated"}, "trtllm": {"interpolated"}, "sglang": {"prior"}}
