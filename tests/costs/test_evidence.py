"""Every step cost says which operators were measured on its GPU."""

from __future__ import annotations

import pytest

from servegym.assets.specs import gpu, model
from servegym.costs.explain import evidence_table
from servegym.costs.step import StepCost

LLAMA = model("Llama-3.1-8B")


@pytest.mark.parametrize("name", ["H100-SXM-80GB", "H200-SXM-141GB", "B200-SXM-180GB"])
def test_a_gpu_whose_operators_were_measured_is_validated(name):
    assert StepCost(gpu(name), LLAMA).status == "validated"
    assert StepCost(gpu(name), LLAMA, tp=2).validated


@pytest.mark.parametrize("name", ["A100-SXM-80GB", "L40S"])
def test_mixed_steps_of_flash_attention_2_were_measured_on_other_gpus_only(name):
    evidence = StepCost(gpu(name), LLAMA).evidence
    (prior,) = [e.operator for e in evidence if e.kind == "prior"]
    assert prior.startswith("decodes beside a prefill")


def test_the_4090_is_validated_alone_but_not_over_a_bus_nobody_measured():
    assert StepCost(gpu("RTX-4090"), LLAMA).validated
    two = StepCost(gpu("RTX-4090"), LLAMA, tp=2)
    assert two.status == "extrapolated"
    assert [e.operator for e in two.evidence if e.kind == "prior"] == ["all-reduce over 2"]


def test_the_a40_has_measured_gemms_and_prior_attention():
    cost = StepCost(gpu("A40"), LLAMA)
    assert not cost.validated
    kinds = {e.operator.split()[0]: e.kind for e in cost.evidence}
    assert kinds == {
        "GEMM": "interpolated",
        "prefill": "prior",
        "decode": "prior",
        "decodes": "prior",
    }


@pytest.mark.parametrize("name", ["L4", "MI300X"])
def test_a_gpu_nobody_measured_is_extrapolated(name):
    assert {e.kind for e in StepCost(gpu(name), LLAMA).evidence} == {"prior"}


def test_a_matrix_beyond_the_fitted_range_is_named():
    # 4090: Llama-3.1-8B alone was measured; half of its output projection is smaller than all
    shapes = {e.operator: e for e in StepCost(gpu("RTX-4090"), LLAMA, tp=2).evidence}
    assert shapes["GEMM 4096 x 2048 bf16"].kind == "extrapolated"
    assert "outside the measured" in shapes["GEMM 4096 x 2048 bf16"].note


def test_a_mixture_is_measured_by_precision_and_routing():
    spec, arch = gpu("H100-SXM-80GB"), model("Qwen3-30B-A3B")
    for routing in ("uniform", "skewed"):
        cost = StepCost(spec, arch, routing=routing)
        assert cost.validated
        assert any(e.operator.endswith(f"{routing} routing") for e in cost.evidence)
    # the A100's balanced mixtures were not measured
    assert not StepCost(gpu("A100-SXM-80GB"), arch).validated


def test_skewed_routing_touches_fewer_experts_and_waits_for_the_fullest():
    spec, arch = gpu("H100-SXM-80GB"), model("Mixtral-8x7B")
    even, skewed = (StepCost(spec, arch, 4, routing=r) for r in ("uniform", "skewed"))
    assert even.terms(64)["experts"] != skewed.terms(64)["experts"]
    assert skewed.terms(4096)["experts"] == pytest.approx(even.terms(4096)["experts"], rel=0.5)


def test_heads_of_another_size_are_extrapolated():
    kinds = {e.kind for e in StepCost(gpu("H100-SXM-80GB"), model("gpt-oss-120b")).evidence}
    assert "extrapolated" in kinds


def test_the_table_shows_every_operator_and_the_verdict():
    cost = StepCost(gpu("A40"), LLAMA)
    table = evidence_table(cost)
    assert str(table.title).startswith("extrapolated")
    assert table.row_count == len(cost.evidence)
