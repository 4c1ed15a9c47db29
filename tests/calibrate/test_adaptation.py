"""A new device from its data sheet and a few steps."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.calibrate.adaptation import (
    AdaptedSource,
    Experience,
    Factors,
    adapt,
    choose_steps,
    fit_factors,
    step_seconds,
    typical_steps,
)
from servegym.calibrate.datasheet import DataSheet, measured_gpus, prior_spec
from servegym.calibrate.leave_out import leave_out
from servegym.calibrate.steps import Steps
from servegym.costs.roofline import RooflineSource
from servegym.costs.step import StepCost
from servegym.costs.tables import tables_installed
from servegym.errors import ConfigError

LLAMA = model("Llama-3.1-8B")
SHEET = DataSheet(
    name="New", bf16_flops=3e14, memory_bytes=48e9, memory_bytes_per_s=1e12, l2_bytes=5e7
)
BASE = prior_spec(SHEET)
TRUE = Factors(arithmetic=1.3, weights=1.1, prefill=1.5, decode=1.2, overhead=1.4)


def steps_of(factors, count=60, seed=3):
    steps = typical_steps(count, seed)
    seconds = step_seconds(AdaptedSource(BASE, factors=factors), BASE, LLAMA, 1, steps)
    return Steps(
        steps.prefill_tokens, steps.decode_sequences, steps.kv_tokens, seconds, steps.prefill_pairs
    )


def test_the_prior_has_the_peaks_of_the_sheet_and_the_medians_of_the_measured():
    assert BASE.memory_bytes_per_s == 1e12
    shares = [gpu(name).gemm.eff_flops for name in measured_gpus()]
    assert pytest.approx(np.median(shares), abs=1e-3) == BASE.gemm.eff_flops
    assert StepCost(BASE, LLAMA).status == "extrapolated"


def test_without_factors_the_prior_is_unchanged():
    steps = typical_steps(10, seed=0)
    mine = step_seconds(AdaptedSource(BASE), BASE, LLAMA, 1, steps)
    assert mine == pytest.approx(step_seconds(RooflineSource(BASE), BASE, LLAMA, 1, steps))


def test_a_factor_multiplies_its_part_alone():
    cost = StepCost(BASE, LLAMA, source=AdaptedSource(BASE, factors=Factors(decode=2.0)))
    plain = StepCost(BASE, LLAMA).terms(8, batch=8, kv_tokens=80000)
    slower = cost.terms(8, batch=8, kv_tokens=80000)
    assert slower["decode attention"] == pytest.approx(2 * plain["decode attention"])
    assert slower["MLP"] == pytest.approx(plain["MLP"])


def test_many_steps_give_the_factors_back():
    ignorant = Experience(np.zeros(5), 1e4 * np.eye(5))
    steps = steps_of(TRUE)
    found = fit_factors(BASE, LLAMA, 1, steps, steps.duration_s, ignorant)
    assert TRUE.model_dump()
    for name, value in TRUE.model_dump().items():
        assert getattr(found, name) == pytest.approx(value, rel=0.02), name


def test_without_steps_the_experience_stands():
    experience = Experience(np.log([1.1, 1.2, 1.3, 1.4, 1.5]), np.eye(5))
    nothing = typical_steps(0, seed=0)
    found = fit_factors(BASE, LLAMA, 1, nothing, nothing.duration_s, experience)
    assert list(found.model_dump().values()) == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.5])


def test_factors_stop_at_the_data_sheet():
    steps = steps_of(Factors())
    found = fit_factors(
        BASE, LLAMA, 1, steps, 0.1 * steps.duration_s, Experience(np.zeros(5), np.eye(5))
    )
    assert found.arithmetic == pytest.approx(BASE.gemm.eff_flops, rel=1e-3)
    assert found.decode == pytest.approx(BASE.decode.eff_bytes, rel=1e-3)


def test_ten_steps_tell_more_than_the_data_sheet():
    found = adapt(BASE, LLAMA, 1, steps_of(TRUE))
    assert found.num_samples == 10
    # TRUE is 10 to 50 % slower than the prior
    assert found.error[0] < 5
    cost = StepCost(BASE, LLAMA, source=found.source(BASE, LLAMA, 1))
    assert cost.status == "extrapolated"
    assert "adapted to 10 steps" in cost.evidence[0].note


def test_an_adaptation_faster_than_the_data_sheet_is_refused():
    found = adapt(BASE, LLAMA, 1, steps_of(TRUE, count=4))
    assert found.error is None
    quick = found.model_copy(update={"factors": Factors(decode=0.5)})
    with pytest.raises(ConfigError, match=r"factor of decode, 0\.5, is faster than the data sheet"):
        quick.source(BASE, LLAMA, 1)


def test_the_steps_that_differ_most_are_chosen():
    sizes = np.array([0.0, 1.0, 1.0, 2000.0])
    steps = Steps(sizes, 4 - np.sign(sizes), 0 * sizes, np.array([1.0, 1.1, 1.0, 9.0]))
    assert choose_steps(steps, 2).tolist() == [0, 3]
    assert choose_steps(steps, 10).tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not tables_installed(), reason="needs the measured tables")
def test_a_device_left_out_is_known_better_with_steps():
    (row,) = leave_out(LLAMA, (0, 10), draws=2, devices=["A100-SXM-80GB"])
    # every GPU but this reaches more of its data sheet: the prior is far off
    assert row.prior[0] > 10
    assert row.adapted[10][0] < 6
