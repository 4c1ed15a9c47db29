"""Operator times equal what the formulas give by hand, and never beat the data sheet."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.assets.specs import AllReduceFit, GpuSpec, KernelFit, gpu, gpu_names
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import Experts, Heads
from servegym.errors import ConfigError

# 1 TFLOP/s, 1 GB/s; every operator reaches half of both
TOY = GpuSpec(
    bf16_flops=1e12,
    fp8_flops=2e12,
    memory_bytes=1e10,
    memory_bytes_per_s=1e9,
    price_usd_per_h=1.0,
    source="made up",
    price_source="made up",
    gemm=KernelFit(c0_s=1e-6, eff_flops=0.5, eff_bytes=0.5, p=1.0),
    prefill=KernelFit(c0_s=1e-6, eff_flops=0.5, eff_bytes=0.5),
    decode=KernelFit(c0_s=3e-6, eff_bytes=0.5, s_per_seq_head=1e-6),
    all_reduce={
        2: AllReduceFit(alpha_s=1e-5, bus_bytes_per_s=1e8, p=1.0),
        4: AllReduceFit(alpha_s=3e-4, bus_bytes_per_s=1e8, p=2.0),
    },
)
SOURCE = RooflineSource(TOY)


def test_a_gemm_is_launch_plus_compute_plus_traffic():
    # FLOPs: 2 * 100 * 200 * 50 = 2e6 / 0.5e12 = 4 us
    # bytes: 2 * (200 * 50 + 100 * 50) + 2 * 100 * 200 = 70,000 / 0.5e9 = 140 us
    assert SOURCE.gemm_s(100, 200, 50, 2.0) == pytest.approx(1e-6 + 4e-6 + 140e-6)


def test_an_fp8_gemm_computes_twice_as_fast_and_reads_half():
    # FLOPs: 2e6 / 1e12 = 2 us; bytes: 15,000 + 40,000 of output = 55,000 / 0.5e9 = 110 us
    fp8 = RooflineSource(TOY, fp8=True)
    assert fp8.gemm_s(100, 200, 50, 1.0) == pytest.approx(1e-6 + 2e-6 + 110e-6)


def test_p_bends_the_roof():
    # FLOPs: 2 * 500^3 = 2.5e8 / 0.5e12 = 500 us; a bandwidth at which the 1.5 MB take 1200 us
    slow = TOY.model_copy(
        update={
            "memory_bytes_per_s": 1.5e6 / 0.5 / 1200e-6,
            "gemm": KernelFit(c0_s=0.0, eff_flops=0.5, eff_bytes=0.5, p=2.0),
        }
    )
    # sqrt(5^2 + 12^2) = 13
    assert RooflineSource(slow).gemm_s(500, 500, 500, 2.0) == pytest.approx(1300e-6)


def test_prefill_attention_counts_the_pairs_under_the_diagonal():
    # query i of 10 sees 20 + i tokens: 255 pairs; FLOPs 4 * 4 * 8 * 255 = 32,640 / 0.5e12
    # bytes: 2 * 8 * (Q and O 2 * 10 * 4 + K and V 2 * 30 * 2) = 3200 / 0.5e9 = 6.4 us
    pairs = sum(20 + i for i in range(1, 11))
    expected = 4 * 4 * 8 * pairs / 0.5e12 + 6.4e-6
    assert SOURCE.prefill_attention_s(10, 20, Heads(4, 2, 8)) == pytest.approx(expected)


def test_decode_attention_reads_the_cache_once():
    # K and V: 2 * 2 bytes * 2 heads * 8 * 1000 = 64,000 / 0.5e9 = 128 us, and 4 * 2 us
    assert SOURCE.decode_attention_s(4, 1000, Heads(8, 2, 8)) == pytest.approx(136e-6)


def test_an_all_reduce_moves_twice_all_but_ones_own_share():
    # over 2: 2 * 1/2 * 10 kB = 10 kB: 100 us + 10 us
    assert SOURCE.all_reduce_s(1e4, 2) == pytest.approx(110e-6)
    # over 4: 2 * 3/4 * 80 kB / 3 = 40 kB: 400 us, with 300 us at p = 2: 500 us
    assert SOURCE.all_reduce_s(8e4 / 3, 4) == pytest.approx(500e-6)
    assert SOURCE.all_reduce_s(1e9, 1) == 0.0


def test_an_all_reduce_without_a_fit_is_refused_with_the_degrees_there_are():
    with pytest.raises(ConfigError, match=r"over 8 GPUs.*\[1, 2, 4\]"):
        SOURCE.all_reduce_s(1.0, 8)


sizes = st.integers(1, 20_000)


@pytest.mark.parametrize("name", gpu_names())
@settings(max_examples=40, deadline=None)
@given(m=sizes, n=sizes, k=sizes)
def test_no_gemm_beats_the_data_sheet(name, m, n, k):
    spec = gpu(name)
    for fp8 in (False, True) if spec.fp8_flops else (False,):
        weight_bytes = 1.0 if fp8 else 2.0
        time_s = RooflineSource(spec, fp8).gemm_s(m, n, k, weight_bytes)
        assert time_s >= 2.0 * m * n * k / (spec.fp8_flops if fp8 else spec.bf16_flops)
        assert time_s >= weight_bytes * n * k / spec.memory_bytes_per_s


@pytest.mark.parametrize("name", gpu_names())
@settings(max_examples=40, deadline=None)
@given(chunk=st.integers(1, 8192), context=st.integers(0, 131_072))
def test_no_prefill_attention_beats_the_data_sheet(name, chunk, context):
    spec = gpu(name)
    time_s = RooflineSource(spec).prefill_attention_s(chunk, context, Heads(32, 8, 128))
    pairs = chunk * context + chunk * (chunk + 1) / 2
    assert time_s >= 4 * 32 * 128 * pairs / spec.bf16_flops
    assert time_s >= 2 * 2 * 8 * 128 * (chunk + context) / spec.memory_bytes_per_s


@pytest.mark.parametrize("name", gpu_names())
@pytest.mark.parametrize(("batch", "kv_tokens"), [(1, 131_072), (8, 8 * 8192), (256, 256 * 64)])
def test_no_decode_attention_beats_the_data_sheet(name, batch, kv_tokens):
    spec = gpu(name)
    time_s = RooflineSource(spec).decode_attention_s(batch, kv_tokens, Heads(32, 8, 128))
    assert time_s >= 2 * 2 * 8 * 128 * kv_tokens / spec.memory_bytes_per_s


def test_an_all_gather_moves_half_of_an_all_reduce_unless_it_was_measured():
    assert SOURCE.all_gather_s(1e6, 2) == 0.5 * SOURCE.all_reduce_s(1e6, 2)
    measured = RooflineSource(TOY.model_copy(update={"all_gather": TOY.all_reduce}))
    # over 2: 1/2 * 20 kB = 10 kB: 100 us + 10 us
    assert measured.all_gather_s(2e4, 2) == pytest.approx(110e-6)
    assert measured.all_gather_s(1e6, 1) == 0.0


def test_a_mixture_measured_under_one_routing_stands_in_for_the_other():
    source = RooflineSource(gpu("A100-SXM-80GB"))
    uniform = Experts(4096, 14336, 8, 2, 3, 2.0, "uniform")
    skewed = uniform._replace(routing="skewed")
    assert source.experts_s(64, uniform) == source.experts_s(64, skewed)
    evidence = source.experts_evidence(uniform)
    assert (evidence.kind, evidence.note) == ("prior", "only skewed routing was measured")
