"""Measured kernels as costs: what was measured where it was, the roofline's growth beyond."""

from __future__ import annotations

import pytest

from servegym.assets.specs import gpu, model
from servegym.calibrate.kernels import KernelTime, KernelTimes, reached_peaks
from servegym.calibrate.plan import GridSize, plan, shapes_of, token_counts
from servegym.costs.source import Heads
from servegym.costs.step import StepCost
from servegym.errors import ConfigError

LLAMA = model("Llama-3.1-8B")
H100 = gpu("H100-SXM-80GB")
GRID = GridSize(max_tokens=32, max_context=1024, max_batch=4, max_kv_tokens=4096)


def seconds(kernel):
    """A device with half the peaks of an H100: every kernel's time by hand."""
    if kernel.operator == "gemm":
        m, n, k = kernel.shape
        return 2e-6 + max(2 * m * n * k / 4e14, 2 * n * k / 1.6e12)
    if kernel.operator == "all_reduce":
        return 1e-5 + kernel.shape[0] / 1e11
    if kernel.operator == "prefill":
        return 8e-6 + 1e-9 * sum(kernel.shape)
    return 5e-6 + 4096 * kernel.shape[1] / 1.6e12


def measured(tp=1, slower=1.0):
    times = [
        KernelTime(
            operator=k.operator, shape=k.shape, median_s=slower * seconds(k), spread=0, samples=9
        )
        for k in plan(LLAMA, tp, GRID)
    ]
    return KernelTimes(grid=GRID, times=tuple(times))


def cost(tp=1):
    return StepCost(H100, LLAMA, tp, source=measured(tp).source(H100, LLAMA, tp))


def test_the_plan_is_a_full_grid_of_each_operator():
    assert token_counts(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    kernels = plan(LLAMA, 1, GRID)
    assert sum(k.operator == "gemm" for k in kernels) == 5 * len(token_counts(32))
    assert [k.shape for k in kernels if k.operator == "prefill"] == [
        (16, 0), (16, 1024), (32, 0), (32, 1024)
    ]  # fmt: skip
    decodes = [k.shape for k in kernels if k.operator == "decode"]
    assert decodes == [(b, 2**power) for b in (1, 4) for power in range(2, 13)]


def test_the_shapes_are_those_that_a_step_asks_for():
    for name in ("Llama-3.1-8B", "Qwen3-30B-A3B", "gpt-oss-120b"):
        asked = [e.operator for e in StepCost(H100, model(name), 2).evidence]
        gemms = shapes_of(model(name), 2).gemms
        assert gemms
        for n, k in gemms:
            assert f"GEMM {n} x {k} bf16" in asked


def test_a_step_is_the_sum_of_its_measured_kernels():
    terms = cost().terms(tokens=4, batch=4, kv_tokens=1024)
    gemm = dict(zip(("qkv", "out", "up", "down", "head"), shapes_of(LLAMA, 1).gemms, strict=True))

    def one(name):
        n, k = gemm[name]
        return 2e-6 + 2 * n * k / 1.6e12  # 4 rows are bound by the weights

    assert terms["attention GEMMs"] == pytest.approx(32 * (one("qkv") + one("out")))
    assert terms["MLP"] == pytest.approx(32 * (one("up") + one("down")))
    assert terms["output head"] == pytest.approx(one("head"))
    attention = terms["attention launch"] + terms["decode attention"]
    assert attention == pytest.approx(32 * (5e-6 + 4096 * 1024 / 1.6e12))


def test_all_reduces_are_those_measured():
    reduces = cost(tp=2).terms(tokens=8)["all-reduce"]
    assert reduces == pytest.approx(2 * 32 * (1e-5 + 2 * 8 * 4096 / 1e11))


def test_beyond_the_measured_sizes_times_grow_as_the_roofline():
    op = cost().operators
    # 8192 rows are bound by arithmetic: twice the rows, twice the time
    assert op.gemm_s(16384, 6144, 4096, 2.0) == pytest.approx(
        2 * op.gemm_s(8192, 6144, 4096, 2.0), rel=0.01
    )
    assert op.decode_attention_s(4, 2**23, Heads(32, 8, 128)) == pytest.approx(
        2 * op.decode_attention_s(4, 2**22, Heads(32, 8, 128)), rel=0.01
    )


def test_a_grid_is_compiled_and_validated():
    step = cost()
    assert step.status == "validated"
    assert {e.kind for e in step.evidence} == {"measured"}
    terms = step.terms(tokens=4, batch=4, kv_tokens=1024)
    assert step.compile(max_tokens=256).step_s([], 4, 1024) == pytest.approx(
        sum(terms.values()), rel=0.02
    )


def test_experts_are_not_measured_so_that_a_mixture_stays_extrapolated_without_fits():
    mixture = model("Qwen3-30B-A3B")
    times = tuple(
        KernelTime(operator=k.operator, shape=k.shape, median_s=1.0, spread=0, samples=9)
        for k in plan(mixture, 1, GRID)
    )
    l4 = gpu("L4")
    source = KernelTimes(grid=GRID, times=times).source(l4, mixture, 1)
    assert StepCost(l4, mixture, source=source).status == "extrapolated"


def test_times_faster_than_the_data_sheet_are_refused():
    with pytest.raises(ConfigError, match=r"gemm kernels: .* faster than the data sheet"):
        measured(slower=0.3).source(H100, LLAMA, 1)


def test_an_unfinished_file_is_refused():
    half = KernelTimes(grid=GRID, times=measured().times[:10])
    with pytest.raises(ConfigError, match=r"unfinished, .* kernels are missing"):
        half.source(H100, LLAMA, 1)


def test_kernels_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="unfinished"):
        measured().source(H100, model("Qwen3-32B"), 1)
    more = KernelTime(operator="gemm", shape=(1, 7, 7), median_s=1, spread=0, samples=9)
    with pytest.raises(ConfigError, match=r"gemm \(1, 7, 7\) is none of this model's"):
        KernelTimes(grid=GRID, times=(*measured().times, more)).source(H100, LLAMA, 1)


def test_a_device_without_data_sheet_is_described_by_what_it_reached():
    sheet = reached_peaks(measured().times, LLAMA, 1, "cpu", 64e9)
    # the widest matrix, 1 row: its weights at 1.6e12 B/s, but for a launch of 2 us
    assert sheet.memory_bytes_per_s == pytest.approx(1.6e12, rel=0.01)
    assert sheet.memory_bytes == 64e9
