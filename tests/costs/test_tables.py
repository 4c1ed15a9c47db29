"""Measured tables give measured times at measured shapes, and say what lies between."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.costs import package, tables
from servegym.costs.package import expert_rows
from servegym.costs.source import Heads
from servegym.costs.step import StepCost
from servegym.costs.tables import TableSource, source_of, tables_installed
from servegym.errors import ConfigError
from servegym.scenario.fleet import EngineConfig, FleetEntry, replica_type, step_cost

H100 = gpu("H100-SXM-80GB")
#: Of the fits; Hopper computes fp4 weights in 16 bits, which nobody measured for GEMMs.
FP4_FITS = {"B200-SXM-180GB": "validated", "H100-SXM-80GB": "extrapolated"}
needs_tables = pytest.mark.skipif(
    not tables_installed(), reason="the package aiconfigurator-core is not installed"
)


@pytest.fixture
def small_tables(monkeypatch):
    """Two matrices at two sizes, ten times slower than the H100's data sheet."""
    n, k, m = (x.ravel() for x in np.meshgrid([4096.0, 16384.0], [4096.0], [64.0, 4096.0]))
    rows = {
        "gemm_dtype": np.full(4, "bfloat16"),
        "m": m,
        "n": n,
        "k": k,
        "latency": 1e3 * 10.0 * np.maximum(2 * m * n * k / 989e12, 2 * n * k / 3.35e12),
    }
    monkeypatch.setattr(tables, "tables_installed", lambda: True)
    monkeypatch.setattr(
        tables,
        "newest_table",
        lambda system, operator, file, backends=(): (rows, "toy") if operator == "gemm" else None,
    )
    monkeypatch.setattr(tables, "expert_rows", lambda *args, **kwargs: None)
    tables._gemm_table.cache_clear()
    tables._attention_table.cache_clear()
    yield rows
    tables._gemm_table.cache_clear()
    tables._attention_table.cache_clear()


def test_a_measured_gemm_takes_what_was_measured(small_tables):
    source = TableSource(H100)
    assert len(small_tables["latency"])
    for m, n, k, ms in zip(*(small_tables[x] for x in ("m", "n", "k", "latency")), strict=True):
        # sizes between which curves are interpolated are not exactly the measured ones
        assert source.gemm_s(m, n, k, 2.0) == pytest.approx(1e-3 * ms, rel=0.02)


def test_a_matrix_between_two_measured_ones_keeps_their_ratio_to_the_roofline(small_tables):
    # half way in the logarithm of n; both neighbours are ten times over the data sheet
    floor_s = 2 * 4096 * 8192 * 4096 / 989e12
    assert TableSource(H100).gemm_s(4096, 8192, 4096, 2.0) == pytest.approx(10 * floor_s, rel=0.02)


def test_each_shape_says_whether_it_was_measured(small_tables):
    source = TableSource(H100)
    kinds = {n: source.gemm_evidence(n, 4096) for n in (4096, 6144, 128256)}
    assert [e.kind for e in kinds.values()] == ["measured", "interpolated", "extrapolated"]
    assert kinds[6144].note == "between measured matrices, nearest 4096 x 4096"


def test_what_the_tables_lack_comes_from_the_fits(small_tables):
    source, fits = TableSource(H100), source_of(H100, "fits")[0]
    shape = (8, 8 * 1024, Heads(32, 8, 128))
    assert source.decode_attention_s(*shape) == fits.decode_attention_s(*shape)
    fp8 = TableSource(H100, fp8=True)
    assert fp8.gemm_s(64, 4096, 4096, 1.0) == source_of(H100, "fits", fp8=True)[0].gemm_s(
        64, 4096, 4096, 1.0
    )


def test_impossible_tables_are_refused(small_tables):
    small_tables["latency"][:] /= 100.0
    with pytest.raises(ConfigError, match="faster than the data sheet allows"):
        TableSource(H100).gemm_s(64, 4096, 4096, 2.0)


def test_without_the_package_the_fits_stand_in_with_a_note(monkeypatch):
    monkeypatch.setattr(tables, "tables_installed", lambda: False)
    source, note = source_of(H100, "tables")
    assert source == source_of(H100, "fits")[0]
    assert "aiconfigurator-core" in note
    assert "the fits stand in" in note
    with pytest.raises(ConfigError, match="use --source fits"):
        TableSource(H100)


def test_a_gpu_without_tables_is_served_by_its_fits_with_a_note():
    source, note = source_of(gpu("RTX-4090"), "tables")
    assert source == source_of(gpu("RTX-4090"), "fits")[0]
    assert note == "There are no measured tables of this GPU: the fits stand in."


def test_an_unknown_source_is_refused():
    with pytest.raises(ConfigError, match=r"unknown cost source 'table': .*did you mean tables"):
        source_of(H100, "table")


# ---- the real tables ----


@needs_tables
@pytest.mark.parametrize("name", ["H100-SXM-80GB", "A100-SXM-80GB", "L40S", "RTX-PRO-6000"])
def test_tables_and_fits_agree_on_steps_of_an_8b_model_within_10_percent(name):
    spec, arch = gpu(name), model("Llama-3.1-8B")
    fits, measured = (
        StepCost(spec, arch, source=source_of(spec, kind)[0]) for kind in ("fits", "tables")
    )
    for step in (
        {"tokens": 1, "batch": 1, "kv_tokens": 1024},
        {"tokens": 64, "batch": 64, "kv_tokens": 65536},
        {"tokens": 2048, "chunk": 2048},
    ):
        a, b = (sum(cost.terms(**step).values()) for cost in (fits, measured))
        assert a == pytest.approx(b, rel=0.10)


@needs_tables
def test_a_measured_head_count_is_found_and_another_takes_the_nearest():
    source = TableSource(H100)
    assert {e.kind for e in source.attention_evidence(Heads(32, 8, 128))} == {"measured"}
    prefill, _ = source.attention_evidence(Heads(28, 4, 128))
    assert prefill.kind == "interpolated"
    assert prefill.note == "ratio to the roofline of the nearest, 32 x 4 x 128"


@needs_tables
def test_fp4_is_measured_where_there_are_fp4_units():
    cost = StepCost(
        gpu("B200-SXM-180GB"),
        model("Llama-3.1-8B"),
        fp4=True,
        source=TableSource(gpu("B200-SXM-180GB"), fp4=True),
    )
    assert cost.status == "validated"
    fits = {name: StepCost(gpu(name), model("Llama-3.1-8B"), fp4=True) for name in FP4_FITS}
    assert {name: cost.status for name, cost in fits.items()} == FP4_FITS


@needs_tables
def test_experts_are_read_in_the_format_of_published_checkpoints():
    system = "h200_sxm"
    kinds = {p: expert_rows(system, p, "uniform", fp4_units=False) for p in ("fp8", "fp4")}
    assert {p: set(rows["moe_dtype"]) for p, (rows, _) in kinds.items()} == {
        "fp8": {"fp8_block"},
        "fp4": {"w4a16_mxfp4"},
    }
    rows, source = expert_rows("b200_sxm", "fp4", "skewed", fp4_units=True)
    assert set(rows["moe_dtype"]) == {"w4a8_mxfp4_mxfp8", "nvfp4"}
    assert set(rows["distribution"]) == {"power_law_1.2"}
    assert "trtllm" in source
    names = ("num_tokens", "hidden_size", "width", "num_experts", "topk")
    shapes = np.stack([rows[name] for name in names], axis=1)
    assert len(np.unique(shapes, axis=0)) == len(shapes)


@needs_tables
def test_a_fleet_entry_chooses_its_cost_source():
    def grid(**entry):
        return replica_type(
            FleetEntry(gpu="H100-SXM-80GB", **entry), "Llama-3.1-8B", "bf16", EngineConfig()
        ).grid

    fits, tables = grid(), grid(costs="tables")
    assert not np.array_equal(fits.dense_s, tables.dense_s)
    assert tables.step_s([], 32, 32768) == pytest.approx(fits.step_s([], 32, 32768), rel=0.15)
    with pytest.raises(ConfigError, match="tables or a calibration file, not both"):
        grid(costs="tables", calibration="mine.json")
    with pytest.raises(ConfigError, match="no measured tables of this GPU"):
        step_cost(FleetEntry(gpu="L4", costs="tables"), "Llama-3.1-8B", "bf16")


def test_experts_are_those_with_a_gate_of_the_kernel_that_engines_call(monkeypatch):
    kernels = ["flow_cutlass", "flow_min_latency", "flow_nongated", "flow"]
    rows = {
        "moe_dtype": np.array(["nvfp4", "nvfp4", "nvfp4", "w4a8_mxfp4_mxfp8"]),
        "kernel_source": np.array(kernels),
        "distribution": np.full(4, "balanced"),
        "latency": np.array([2.0, 3.0, 1.0, 4.0]),
    }
    shape = {"num_tokens": 8, "hidden_size": 64, "inter_size": 32, "num_experts": 4, "topk": 2}
    shape |= {"moe_tp_size": 1, "moe_ep_size": 1}
    rows |= {name: np.full(4, float(value)) for name, value in shape.items()}
    rows["inter_size"][3] = 16.0
    monkeypatch.setattr(package, "newest_table", lambda *of: (rows, "toy"))
    expert_rows.cache_clear()
    found, source = expert_rows("toy", "fp4", "uniform", fp4_units=True)
    expert_rows.cache_clear()
    assert found["kernel_source"].tolist() == ["flow_min_latency", "flow"]
    assert source == "toy, w4a8_mxfp4_mxfp8 and nvfp4"
