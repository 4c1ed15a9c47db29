"""How far step times may be off: by term, by kind of evidence, and in worlds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.calibrate.engine import EngineFit
from servegym.costs.source import Evidence
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import ENGINE_SPREADS, Uncertainty, World, spread, term_spreads

LLAMA = model("Llama-3.1-8B")
WORLDS = [World(seed) for seed in range(400)]


def doubt(name: str, tp: int = 1) -> Uncertainty:
    cost = StepCost(gpu(name), LLAMA, tp)
    return Uncertainty.of(name, cost, cost.compile())


@pytest.mark.parametrize(("name", "tp"), [("H100-SXM-80GB", 1), ("L40S", 4)])
def test_parts_are_all_of_the_dense_term_and_grow_by_their_factors(name, tp):
    cost = StepCost(gpu(name), LLAMA, tp)
    grid = cost.compile()
    found = Uncertainty.of(name, cost, grid)
    assert sum(found.parts_s.values()) == pytest.approx(grid.dense_s)
    factor, moved = found.factors(WORLDS[3]), found.in_world(grid, WORLDS[3])
    grown = sum(factor[term] * seconds for term, seconds in found.parts_s.items())
    assert moved.dense_s == pytest.approx(grown)
    assert moved.cpu_s == pytest.approx(factor["cpu"] * grid.cpu_s)
    assert moved.prefill_s == pytest.approx(factor["prefill"] * grid.prefill_s)
    assert moved.mixed_s == pytest.approx(factor["mixed"] * grid.mixed_s)


def test_spread_follows_held_out_errors_and_is_wider_where_less_is_known():
    # 3.0 and 13.3 %: 0.030 / 0.6745 = 0.044, 0.133 / 1.96 = 0.068
    held_out = Evidence("GEMM", "interpolated", error=(3.0, 13.3))
    assert spread("GEMM", held_out, pcie=False) == pytest.approx(0.133 / 1.96)
    beyond = Evidence("GEMM", "extrapolated", error=(3.0, 13.3))
    assert spread("GEMM", beyond, pcie=False) == pytest.approx(1.5 * 0.133 / 1.96)
    own = spread("GEMM", Evidence("GEMM", "measured"), pcie=False)
    prior = spread("GEMM", Evidence("GEMM", "prior"), pcie=False)
    assert own < spread("GEMM", held_out, pcie=False) < prior
    assert term_spreads(StepCost(gpu("H100-SXM-80GB"), LLAMA))["GEMM"] == pytest.approx(
        max(3.0 / 67.45, 13.3 / 196), abs=1e-3
    )


def test_a_collective_over_pcie_is_extrapolated_and_off_by_a_factor_of_five_in_all():
    pair, board = StepCost(gpu("L40S"), LLAMA, 2), StepCost(gpu("H100-SXM-80GB"), LLAMA, 2)
    assert board.validated
    (over_pcie,) = pair.evidence_by_operator["collectives"]
    assert over_pcie.kind == "prior"
    assert "another host" in over_pcie.note
    assert not pair.validated
    wide, narrow = (term_spreads(cost)["collectives"] for cost in (pair, board))
    assert math.exp(2 * 1.645 * wide) == pytest.approx(5.0)
    assert narrow < wide / 2
    measured = Evidence("all-reduce over 2", "measured", "own benchmark")
    assert spread("collectives", measured, pcie=True) < narrow


def test_factors_have_the_median_1_and_the_spread_stated():
    found = doubt("H100-SXM-80GB")
    drawn = [found.factors(world) for world in WORLDS]
    for term in ("cpu", "GEMM", "decode"):
        logs = np.log([factor[term] for factor in drawn])
        assert abs(np.median(logs)) < 0.2 * found.spreads[term]
        assert logs.std() == pytest.approx(found.spreads[term], rel=0.1)
    steps = np.log([world.step_factor("vllm") for world in WORLDS])
    assert steps.std() == pytest.approx(ENGINE_SPREADS["vllm"].step, rel=0.15)
    assert WORLDS[5].step_factor("vllm-priority") == WORLDS[5].step_factor("vllm")


def test_replicas_of_one_gpu_are_off_together_and_those_of_others_are_not():
    one, two = doubt("H100-SXM-80GB"), doubt("H100-SXM-80GB", 2)
    other = doubt("H200-SXM-141GB")
    logs = np.log([[d.factors(world)["GEMM"] for d in (one, two, other)] for world in WORLDS])
    together = np.corrcoef(logs.T)
    assert together[0, 1] == pytest.approx(1.0)
    assert abs(together[0, 2]) < 0.2
    # one kernel attends in steps of decodes alone and in mixed ones
    assert "mixed" not in one.spreads
    assert one.factors(WORLDS[0])["mixed"] == one.factors(WORLDS[0])["decode"]


def test_steps_that_an_engine_logged_are_off_as_a_whole_and_by_no_engine_beside():
    fit = EngineFit(
        overhead_s=8e-3,
        s_per_prefill_token=3e-5,
        s_per_sequence=4e-5,
        s_per_kv_token=6e-8,
        error=(2.0, 5.88),
        num_steps=100,
        max_prefill_tokens=2048,
        max_sequences=128,
        max_kv_tokens=100_000,
    )
    h100 = gpu("H100-SXM-80GB")
    cost = StepCost(h100, LLAMA, source=fit.source(h100, LLAMA, 1))
    found = Uncertainty.of("H100-SXM-80GB", cost, cost.compile())
    # 5.88 % / 1.96 says more than 2 % / 0.6745
    assert list(found.spreads.values()) == pytest.approx([0.03] * len(found.spreads))
    assert len(set(found.factors(WORLDS[0]).values())) == 1
    assert found.engine_factor(WORLDS[0], "vllm") == 1.0
    assert doubt("H100-SXM-80GB").engine_factor(WORLDS[0], "vllm") != 1.0
