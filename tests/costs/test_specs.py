"""GPU and model specifications: complete, sourced, consistent with published tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from servegym.assets.specs import gpu, gpu_names, model, model_names
from servegym.costs.step import StepCost
from servegym.errors import ConfigError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published tables are not here")
#: Models with one table for embedding and output head.
ONE_TABLE = ("Falcon-180B", "Gemma-2-9B", "OPT-6.7B", "BLOOM-7B1")


def published(file, key):
    with (DATA / "published" / file).open(newline="") as text:
        return {row[key]: row for row in csv.DictReader(text)}


@pytest.mark.parametrize("name", gpu_names())
def test_a_gpu_says_where_its_numbers_are_from(name):
    spec = gpu(name)
    assert len(spec.source) > 10
    assert len(spec.price_source) > 10
    for fit in (spec.gemm, spec.prefill, spec.decode):
        # a fit has a source and its error; what was not measured says that it is a prior
        assert fit.prior != bool(fit.source)
        assert fit.prior == (fit.error is None)


@pytest.mark.parametrize(
    ("name", "chip"), [("A100-SXM-40GB", "A100-SXM-80GB"), ("H100-PCIe-80GB", "H100-SXM-80GB")]
)
def test_a_gpu_takes_the_shares_of_the_same_chip_as_priors(name, chip):
    spec, same = gpu(name), gpu(chip)
    assert spec.gemm.prior
    assert spec.gemm.eff_bytes == same.gemm.eff_bytes
    assert spec.gemm.correction == same.gemm.correction
    assert spec.memory_bytes_per_s < same.memory_bytes_per_s
    assert not StepCost(spec, model("Llama-3.1-8B")).validated


@pytest.mark.parametrize("name", gpu_names())
@pytest.mark.parametrize("operator", ["gemm", "prefill", "decode"])
def test_an_efficiency_is_a_share_of_the_data_sheet(name, operator):
    fit = getattr(gpu(name), operator)
    assert 0 < fit.eff_bytes <= 1
    assert 0 < fit.eff_flops <= 1
    assert 0 < fit.c0_s < 1e-4
    assert fit.p >= 1


@pytest.mark.parametrize("name", gpu_names())
def test_peaks_have_plausible_sizes(name):
    spec = gpu(name)
    assert 5e13 < spec.bf16_flops < 5e15
    assert spec.fp8_flops == 0 or spec.fp8_flops == pytest.approx(2 * spec.bf16_flops, rel=0.02)
    assert 2e10 <= spec.memory_bytes < 4e11
    assert 2e11 < spec.memory_bytes_per_s < 1e13
    assert 0.1 < spec.price_usd_per_h < 20


@pytest.mark.parametrize("name", gpu_names())
def test_a_bus_is_slower_than_the_memory(name):
    spec = gpu(name)
    assert spec.all_reduce or name == "GH200-96GB"  # one GPU a node
    for fit in spec.all_reduce.values():
        assert 0 < fit.bus_bytes_per_s < spec.memory_bytes_per_s
        assert 1e-6 < fit.alpha_s < 1e-4


@needs_data
@pytest.mark.parametrize("name", [n for n in gpu_names() if n not in ("RTX-A6000", "GB300-288GB")])
def test_peaks_are_those_of_the_data_sheet(name):  # of two there is none
    sheet = published("gpus.csv", "gpu")[name]
    spec = gpu(name)
    assert spec.bf16_flops == pytest.approx(1e12 * float(sheet["bf16_dense_tflops"]))
    assert spec.fp8_flops == pytest.approx(1e12 * float(sheet["fp8_dense_tflops"] or 0))
    # sheets mean GiB; ECC takes up to 1/16 of it on boards with GDDR memory
    assert 0.93 < spec.memory_bytes / (2**30 * float(sheet["hbm_gb"])) < 1.001
    assert spec.memory_bytes_per_s == pytest.approx(1e12 * float(sheet["hbm_tb_s"]))


@pytest.mark.parametrize("name", model_names())
def test_parameters_are_those_of_the_architecture(name):
    m = model(name)
    if m.latent_dim:
        latents = m.hidden * (m.latent_query_dim + m.latent_dim + m.latent_rope_dim)
        query = m.latent_query_dim * m.heads * (m.head_dim + m.latent_rope_dim)
        expansion = m.latent_dim * m.heads * 2 * m.head_dim
        attention = latents + query + expansion + m.heads * m.head_dim * m.hidden
    else:
        attention = m.hidden * m.head_dim * (2 * m.heads + 2 * m.kv_heads)  # Q, O and K, V
    dense = m.ffn_matrices * m.ffn_dim * m.hidden
    experts = m.num_experts * (m.ffn_matrices * m.expert_ffn_dim + 1)  # 1: the router
    experts = m.hidden * (experts + m.ffn_matrices * m.shared_ffn_dim)
    dense_layers = m.layers - m.expert_layers
    params = m.layers * attention + dense_layers * dense + m.expert_layers * experts
    tables = 1 if name in ONE_TABLE else 2
    assert m.num_params == pytest.approx(params + tables * m.vocab * m.hidden, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("DeepSeek-V3", 671e9),
        ("DeepSeek-R1", 671e9),
        ("Kimi-K2.5", 1.04e12),
        ("MiniMax-M2.5", 229e9),
        ("Llama-4-Maverick", 400e9),
        ("Llama-4-Scout", 109e9),
        ("Phi-4", 14.7e9),
        ("Gemma-2-9B", 9.24e9),
        ("OPT-6.7B", 6.66e9),
        ("BLOOM-7B1", 7.07e9),
        ("Qwen1.5-7B", 7.72e9),
        ("DeciLM-7B", 7.04e9),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1.78e9),
    ],
)
def test_parameters_are_as_many_as_published(name, params):
    # of Kimi and Llama 4 with an image encoder, which is not modelled; of DeciLM without the
    # KV heads that engines pad
    assert model(name).num_params == pytest.approx(params, rel=0.015)


@pytest.mark.parametrize("name", model_names())
def test_a_token_caches_two_bytes_of_k_and_v_of_every_layer(name):
    m = model(name)
    if m.latent_dim:  # the latent and the rotary key, once for all heads
        assert m.kv_bytes_per_token == 2 * m.layers * (m.latent_dim + m.latent_rope_dim)
    else:
        assert m.kv_bytes_per_token == 2 * 2 * m.layers * m.kv_heads * m.head_dim


@pytest.mark.parametrize("name", model_names())
def test_a_model_is_consistent_and_sourced(name):
    m = model(name)
    assert m.heads % m.kv_heads == 0
    assert m.active_experts <= m.num_experts
    assert bool(m.num_experts) == bool(m.expert_ffn_dim)
    assert len(m.source) > 10


@needs_data
@pytest.mark.parametrize("name", model_names())
def test_an_architecture_is_the_published_one(name):
    rows = published("models.csv", "model")
    if name not in rows:
        pytest.skip("not among the published architectures")
    row = rows[name]
    m = model(name)
    same = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab")
    assert [getattr(m, key) for key in same] == [int(row[key]) for key in same]
    assert m.num_experts == int(row["n_experts"] or 0)
    assert m.active_experts == int(row["active_experts"] or 0)


@pytest.mark.parametrize(
    ("find", "kind", "got", "near"),
    [
        (gpu, "GPU", "A100-SXM-80G", "A100-SXM-80GB"),
        (model, "model", "Llama-3.1-8", "Llama-3.1-8B"),
    ],
)
def test_an_unknown_name_is_refused_with_all_and_the_nearest(find, kind, got, near):
    with pytest.raises(ConfigError) as caught:
        find(got)
    message = str(caught.value)
    assert message.startswith(f"unknown {kind} {got!r}: choose one of ")
    assert message.endswith(f"did you mean {near}?")
    for name in gpu_names() if find is gpu else model_names():
        assert name in message
