"""Fits to an engine's log, as costs: a step sums to the fit, and none beats the roofline."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import gpu, model
from servegym.calibrate.engine import fit_engine
from servegym.calibrate.steps import Steps
from servegym.costs.step import StepCost
from servegym.errors import ConfigError

LLAMA = model("Llama-3.1-8B")
H100 = gpu("H100-SXM-80GB")


def log(scale=1.0, sequence_s=4e-5):
    rng = np.random.default_rng(0)
    prefill = rng.integers(1, 2048, 200) * (rng.random(200) < 0.4)
    sequences = rng.integers(1, 128, 200)
    kv = sequences * rng.integers(100, 4000, 200)
    pairs = prefill * (prefill + 1) / 2 + prefill * rng.integers(0, 4096, 200)
    duration = 8e-3 + 3e-5 * prefill + sequence_s * sequences + 6e-8 * kv + 2e-9 * pairs
    columns = (prefill, sequences, kv, scale * duration, pairs)
    return Steps(*(np.asarray(x, np.float64) for x in columns))


@pytest.mark.parametrize("sequence_s", [4e-5, 2e-5])
@pytest.mark.parametrize(
    ("name", "tp"), [("Llama-3.1-8B", 1), ("Llama-3.1-8B", 2), ("Mixtral-8x7B", 2)]
)
def test_a_step_sums_to_the_fit(name, tp, sequence_s):
    fit = fit_engine(log(sequence_s=sequence_s, scale=4), H100, model(name), tp)
    assert fit.error == (0.0, 0.0)
    assert fit.s_per_prefill_pair == pytest.approx(8e-9)
    cost = StepCost(H100, model(name), tp, source=fit.source(H100, model(name), tp))
    wanted = 4 * (8e-3 + 3e-5 * 500 + sequence_s * 20 + 6e-8 * 9000 + 2e-9 * 500 * (100 + 250.5))
    assert sum(cost.terms(520, 500, 100, 20, 9000).values()) == pytest.approx(wanted)
    assert cost.compile().step_s([(500, 100)], 20, 9000) == pytest.approx(wanted, rel=0.01)
    assert cost.status == "validated"


def test_the_reach_of_the_log_is_kept():
    steps = log()
    fit = fit_engine(steps, H100, LLAMA, 1)
    assert fit.num_steps == 200
    assert fit.max_kv_tokens == steps.kv_tokens.max()
    assert "200 engine steps" in fit.source(H100, LLAMA, 1).gemm_evidence(1, 1).note


def test_steps_faster_than_the_roofline_are_refused():
    with pytest.raises(ConfigError, match=r"engine steps: .* faster than the data sheet allows"):
        fit_engine(log(scale=0.1), H100, LLAMA, 1)


def test_terms_faster_than_the_roofline_are_refused():
    fit = fit_engine(log(), H100, LLAMA, 1)
    # 8e-3 s a step is above the 4.5e-3 s that reading 15 GB takes; 2e-3 s is not
    quick = fit.model_copy(
        update={"overhead_s": 2e-3, "s_per_kv_token": 0.0, "s_per_sequence": 0.0}
    )
    with pytest.raises(ConfigError, match="faster than the data sheet"):
        quick.source(H100, LLAMA, 1)


def test_a_log_without_prefills_is_refused():
    steps = log()
    none = Steps(
        0 * steps.prefill_tokens, steps.decode_sequences, steps.kv_tokens, steps.duration_s
    )
    with pytest.raises(ConfigError, match="only 0 steps of the log have prompt tokens"):
        fit_engine(none, H100, LLAMA, 1)


def test_sliding_windows_are_refused():
    fit = fit_engine(log(scale=3), H100, model("gpt-oss-120b"), 1)
    with pytest.raises(ConfigError, match="sliding windows"):
        fit.source(H100, model("gpt-oss-120b"), 1)
