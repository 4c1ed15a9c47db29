"""Fits find what made the data, refuse the impossible, and their stated errors are true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kernel_tables import profiles as data
from kernel_tables.fitting import fit_collective, fit_mixed, fit_operator, held_out_error
from servegym.assets.specs import GpuSpec, calibrated, gpu, gpu_names
from servegym.costs import forms
from servegym.costs.forms import collective_s
from servegym.costs.measurements import Measurements, error, refuse_impossible
from servegym.costs.roofline import RooflineSource
from servegym.costs.source import Heads
from servegym.errors import ConfigError

KERNELS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "kernels"
needs_data = pytest.mark.skipif(not KERNELS.is_dir(), reason="the kernel tables are not here")

TOY = {
    "bf16_flops": 1e12,
    "memory_bytes": 1e10,
    "memory_bytes_per_s": 1e9,
    "price_usd_per_h": 1.0,
    "source": "made up",
    "price_source": "made up",
    "gemm": {"c0_s": 1e-6, "eff_bytes": 0.5},
    "prefill": {"c0_s": 1e-6, "eff_bytes": 0.5},
    "decode": {"c0_s": 1e-6, "eff_bytes": 0.5},
    "all_reduce": {},
}


FEW_KNOTS = {"m": (1, 64, 4096), "n*k": (1, 4096, 2.0**24)}


def toy_gemms(factor=1.0):
    """Times on a grid: 5 us, and work at 80 % of both peaks, both roofs bent with p = 2."""
    m, n, k = (x.ravel() for x in np.meshgrid(*[2.0 ** np.arange(0, 13, 2)] * 3))
    operator = forms.gemm(m, n, k, 2.0)
    work = np.hypot(operator.flops / 0.8e12, operator.num_bytes / 0.8e9)
    held_out = (np.log2(n) + np.log2(k)) % 4 == 2
    return Measurements(operator, factor * (5e-6 + work), held_out, "made up")


def test_a_fit_finds_launch_and_efficiencies():
    fit = fit_operator("gemm", toy_gemms(), GpuSpec.model_validate(TOY), 1e12, FEW_KNOTS)
    assert fit.c0_s == pytest.approx(5e-6, rel=0.2)
    assert fit.eff_bytes == pytest.approx(0.8, abs=0.03)
    assert fit.error[0] < 2
    assert fit.num_held_out == toy_gemms().held_out.sum()


def test_what_is_held_out_does_not_move_a_fit():
    whole, changed = toy_gemms(), toy_gemms()
    changed.seconds[changed.held_out] *= 3.0
    spec = GpuSpec.model_validate(TOY)
    one, other = (fit_operator("gemm", table, spec, 1e12, FEW_KNOTS) for table in (whole, changed))
    assert one.correction == other.correction
    assert one.c0_s == other.c0_s
    assert other.error[0] == pytest.approx(100 * (1 - 1 / 3), abs=2)  # and its error shows it


def test_errors_are_median_and_95th_percentile():
    measured = np.ones(101)
    assert error(1.0 + np.arange(101) / 100.0, measured) == (50.0, 95.0)


def test_a_table_faster_than_the_peak_is_refused():
    # the wrong unit: milliseconds read as 100 ms
    with pytest.raises(ConfigError, match="faster than the data sheet allows, up to"):
        refuse_impossible(toy_gemms(factor=0.01), 1e12, 1e9, 0.0)


def test_a_table_faster_than_the_memory_is_excused_within_the_cache_only():
    operator = forms.decode(1.0, np.full(50, 1000.0), 1, 1, 1)  # 4 kB at 1 kB/s: 4 s
    table = Measurements(operator, np.full(50, 1.0), np.zeros(50, bool), "made up")
    refuse_impossible(table, 1.0, 1e3, cache_bytes=4000.0)
    with pytest.raises(ConfigError, match=r"100% of the times.*up to 4.0 times"):
        refuse_impossible(table, 1.0, 1e3, cache_bytes=1000.0)


def test_a_coefficient_above_the_data_sheet_is_refused():
    entry = {**TOY, "gemm": {"c0_s": 1e-6, "eff_bytes": 1.2}}
    with pytest.raises(ConfigError, match=r"^calibration of X, gemm: a kernel cannot be faster"):
        calibrated("X", entry)


def test_a_correction_of_the_wrong_size_is_refused():
    bad = {"c0_s": 1e-6, "eff_bytes": 1.0, "correction": {"axes": {"m": [1, 2]}, "percent": [0]}}
    with pytest.raises(ConfigError, match="a correction over 2 knots has 1 values"):
        calibrated("X", {**TOY, "gemm": bad})


# ---- the committed coefficients ----


@needs_data
def test_the_committed_errors_of_the_h100_are_those_of_its_held_out_measurements():
    spec = gpu("H100-SXM-80GB")
    for fit, table, peak in (
        (spec.gemm, data.aic_gemm(KERNELS, "h100_sxm", "bf16"), spec.bf16_flops),
        (spec.fp8_gemm, data.aic_gemm(KERNELS, "h100_sxm", "fp8"), spec.fp8_flops),
        (spec.prefill, data.aic_prefill(KERNELS, "h100_sxm"), spec.bf16_flops),
        (spec.decode, data.aic_decode(KERNELS, "h100_sxm"), spec.bf16_flops),
    ):
        assert held_out_error(fit, table, peak, spec.memory_bytes_per_s) == fit.error
        assert 0.4 < table.held_out.mean() < 0.6


@needs_data
def test_fitting_the_decode_attention_of_the_l40s_again_gives_the_committed_coefficients():
    spec = gpu("L40S")
    table = data.aic_decode(KERNELS, "l40s")
    again = fit_operator("decode", table, spec, spec.bf16_flops)
    assert again.model_dump(exclude={"correction"}) == spec.decode.model_dump(
        exclude={"correction"}
    )
    off = np.array(again.correction.percent) - np.array(spec.decode.correction.percent)
    assert np.abs(off).max() <= 1  # rounding


@pytest.mark.parametrize("name", [n for n in gpu_names() if gpu(n).aic_system])
def test_decode_and_prefill_attention_are_within_4_percent_in_the_median(name):
    assert gpu(name).decode.error[0] <= 4
    assert gpu(name).prefill.error[0] <= 4
    # the correction is what makes it so
    assert gpu(name).decode.form_error[0] > 4


@needs_data
@pytest.mark.parametrize(
    ("name", "model", "tp"),
    [
        ("RTX-4090", "", 1),
        ("RTX-PRO-6000", "", 1),
        ("RTX-PRO-6000", "", 2),  # fitted on one GPU's share of Llama-3.1-8B alone
        ("RTX-PRO-6000", "Qwen/Qwen3-30B-A3B-Instruct-2507", 1),
        ("RTX-PRO-6000", "Qwen/Qwen3-30B-A3B-Instruct-2507", 2),
    ],
)
def test_mixed_steps_are_nearer_than_the_sum_of_chunk_and_decodes(name, model, tp):
    spec = gpu(name)
    calls, chunk_s, tiles = data.llmss_mixed(KERNELS, name.replace("-", ""), spec, model, tp)
    beside_s = chunk_s + spec.mixed.s_per_empty_tile * tiles
    whole_s = beside_s + calls.operator.form_s(spec.mixed, spec.bf16_flops, spec.memory_bytes_per_s)
    median, _ = error(whole_s[calls.held_out], calls.seconds[calls.held_out])
    batch = calls.operator.coordinates["sequence heads"] / (32 / tp)
    usual = (batch >= 16) & (chunk_s > 0)
    usual_median, _ = error(whole_s[usual], calls.seconds[usual])
    assert median < 15.0
    assert usual_median < 12.0


@needs_data
@pytest.mark.parametrize("model", ["", "Qwen/Qwen3-30B-A3B-Instruct-2507"])
@pytest.mark.parametrize("tp", [1, 2])
def test_decode_attention_of_an_engine_is_met_for_either_group_of_heads(model, tp):
    spec = gpu("RTX-PRO-6000")
    calls = data.llmss_decode(KERNELS, "RTXPRO6000", model, tp)
    at, heads = calls.operator.coordinates, 32 // tp
    kv_heads = heads // int(at["group"][0])

    def simulated_s(spec):
        source = RooflineSource(spec)
        shapes = zip(at["batch"], at["context"], strict=True)
        return np.array(
            [
                source.decode_attention_s(b, b * c, Heads(heads, kv_heads, 128)) + spec.decode.c0_s
                for b, c in shapes
            ]
        )

    out = calls.held_out
    usual = out & (at["batch"] >= 32) & (at["context"] >= 512)
    with_it, without = (
        simulated_s(s) for s in (spec, spec.model_copy(update={"decode_streamed": None}))
    )
    assert error(with_it[usual], calls.seconds[usual])[0] < 5
    assert error(without[usual], calls.seconds[usual])[0] > 6
    assert error(with_it[out], calls.seconds[out])[0] < error(without[out], calls.seconds[out])[0]


def test_what_empty_tiles_cost_is_found_beside_decodes_of_any_cost():
    spec = gpu("RTX-4090")
    batch, chunk = (a.ravel() for a in np.meshgrid(2.0 ** np.arange(9), 2.0 ** np.arange(4, 12)))
    shape = (32, 8, 128.0, spec.l2_bytes, spec.num_sms)
    operator = forms.unpacked_decode(batch, 500 * batch, *shape)
    tiles = forms.empty_tiles(batch, chunk, 32)
    chunk_s = 1e-7 * chunk
    decodes_s = operator.form_s(spec.mixed, spec.bf16_flops, spec.memory_bytes_per_s)
    seconds = chunk_s + decodes_s + 2e-9 * tiles
    calls = data.Measurements(operator, seconds, batch == 4, "made up")
    fit = fit_mixed(calls, chunk_s, tiles, spec)
    assert fit.s_per_empty_tile == pytest.approx(2e-9, rel=0.01)
    assert fit.error[0] < 5


@needs_data
def test_fitting_mixed_steps_again_gives_the_committed_coefficients():
    spec = gpu("RTX-4090")
    assert fit_mixed(*data.llmss_mixed(KERNELS, "RTX4090", spec), spec) == spec.mixed


def test_a_fit_of_a_collective_finds_latency_and_bandwidth():
    num_bytes = 2.0 ** np.arange(10, 30)
    seconds = 8e-6 + 0.75 * num_bytes / 5e10
    fit = fit_collective(0.75 * num_bytes, seconds)
    predicted = np.array([collective_s(fit, 0.75 * size) for size in num_bytes])
    assert predicted == pytest.approx(seconds, rel=0.1)
