"""Tests of measured kernels by number format and engine."""

import numpy as np
import pytest

from kernel_tables import library
from servegym.assets.specs import gpu
from servegym.costs.forms import collective_s, table_of
from servegym.costs.package import newest_table, tables_installed, where

needs_tables = pytest.mark.skipif(
    not tables_installed(), reason="the package with the tables is not installed"
)
H200 = gpu("H200-SXM-141GB")


@needs_tables
def test_a_gemm_on_fp8_operands_is_the_layer_less_its_quantisation():
    found = library.static_gemm(H200, "fp8")
    layer = where(
        newest_table("h200_sxm", "gemm", "gemm_perf.parquet", ("trtllm",))[0], gemm_dtype="fp8"
    )
    saved = 1e-3 * layer["latency"] - found.seconds
    few = layer["m"] == 8
    assert (found.seconds > 0).all()
    assert np.median(saved[few]) == pytest.approx(8.6e-6, abs=0.5e-6)  # scale and cast
    # what is left of a small layer is a kernel's launch
    small = few & (layer["n"] * layer["k"] <= 2**20)
    assert np.median(found.seconds[small]) < 8e-6


@needs_tables
@pytest.mark.parametrize("engine", ["trtllm", "sglang"])
def test_an_engines_fits_meet_its_own_tables_better_than_vllms(engine):
    for name in ("prefill", "decode"):
        data = library.attention(H200, engine, name, "bf16")
        off = []
        for spec in (H200.of(engine), H200):
            fit = getattr(spec, name)
            predicted = data.operator.measured_s(
                fit, table_of(fit), spec.bf16_flops, spec.memory_bytes_per_s
            )
            off.append(np.median(np.abs(predicted / data.seconds - 1.0)))
        assert off[0] < 0.04 < 0.14 < off[1]


@needs_tables
def test_groups_larger_than_models_have_are_left_out():
    group = library.attention(H200, "trtllm", "decode", "fp8").operator.coordinates["group"]
    assert group.max() == library.LARGEST_GROUP


@needs_tables
def test_all_reduces_are_those_in_cuda_graphs_in_bytes():
    num_bytes, seconds = library.all_reduce(H200, "trtllm", 4)
    predicted = [collective_s(H200.of("trtllm").all_reduce[4], 1.5 * size) for size in num_bytes]
    assert np.median(np.abs(predicted / seconds - 1.0)) < 0.05
    graphs = library.all_reduce(H200, "vllm", 4)
    assert len(graphs[0]) == len(num_bytes)  # the eager ones are not among them


def test_a_gpu_that_the_package_lacks_has_none():
    unknown = H200.model_copy(update={"aic_system": "no_such"})
    if not tables_installed():
        pytest.skip("the package with the tables is not installed")
    assert library.static_gemm(unknown, "fp8") is None
    assert library.block_gemm(unknown) is None
    assert library.quantise(unknown) is None
    assert library.attention(unknown, "vllm", "decode", "fp8") is None
    assert library.all_reduce(unknown, "vllm", 2) is None
