"""When schedulers see requests of published rows, and what that costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster.rank_rules import PrefillTogether
from servegym.validate.engine import EngineConstants, EngineSetup
from servegym.validate.experiments import play
from servegym.validate.published import experiment, read_published
from servegym.validate.reception import PROMPT_TOKEN_S, REQUEST_S, Reception, front_end_s
from servegym.validate.replay import replay_closed

INFERENCEX = "agg; InferenceX/InferenceMAX dump (lengths random in [0.8,1.0]x nominal)"


@pytest.mark.parametrize(
    ("reception", "per_step", "steps", "companions"),
    [
        (Reception(), 0.5, 0.0, 0.0),
        (Reception(overlapped=True), 0.5, 1.0, 0.0),
        # looks at steps 0, 10, ...: those that come wait 1 to 10 of them instead of 1
        (Reception(look_steps=10), 0.5, 4.5, 4.5),
        # one in 20 steps waits for all of them; of two the second comes after ten
        (Reception(gather_steps=20), 0.0, 20.0, 0.0),
        (Reception(gather_steps=20), 0.05, 15.0, 1.0),
    ],
)
def test_a_request_waits_until_its_scheduler_looks(reception, per_step, steps, companions):
    assert reception.wait_steps(per_step) == pytest.approx(steps)
    assert reception.companions(per_step) == pytest.approx(companions)


SGLANG = {"engine": "sglang", "model": "deepseek-ai/DeepSeek-R1", "precision_w": "fp8", "tp": "8"}
TRTLLM = {"engine": "trtllm", "model": "nvidia/Llama-3.1-70B-Instruct-FP8", "precision_w": "fp8"}
LONG = {"isl": "1024", "osl": "1024", "tpot_mean": "90", "gpu_count": "", "notes": INFERENCEX}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"engine_version": "0.19.0"}, Reception(overlapped=True)),
        ({"engine_version": "0.12.0"}, Reception()),
        ({"engine_version": "0.6.3"}, Reception()),
        ({"engine": "TensorRT-LLM", "engine_version": "0.20"}, Reception()),
        ({"engine": "TensorRT-LLM", "engine_version": "1.0.0"}, Reception(overlapped=True)),
        (SGLANG | LONG, Reception(overlapped=True)),
        (SGLANG | LONG | {"gpu": "b200_sxm"}, Reception(overlapped=True, look_steps=10)),
        (
            SGLANG | LONG | {"gpu": "b200_sxm", "concurrency": "16"},
            Reception(overlapped=True, look_steps=30),
        ),
        (TRTLLM | LONG | {"tp": "4"}, Reception(overlapped=True, gather_steps=20)),
        (TRTLLM | LONG | {"tp": "8"}, Reception(overlapped=True)),
        (TRTLLM | LONG | {"tp": "4", "osl": "8192"}, Reception(overlapped=True)),
        (
            LONG | {"engine_version": "", "model": "openai/gpt-oss-120b", "precision_w": "mxfp4"},
            Reception(overlapped=True),
        ),
    ],
)
def test_engines_and_scripts_say_when_schedulers_look(write_table, cells, expected):
    assert experiment(read_published(write_table(cells))[0]).reception == expected


RANKS = {
    "file": "aic_inferencex",
    "source": "sample.csv; id=dsr1_tp4_0_ep4_0_7",
    "engine": "trtllm",
    "model": "deepseek-ai/DeepSeek-R1",
    "gpu": "b200_sxm",
    "precision_w": "nvfp4",
    "tp": "1",
    "dp": "4",
    "ep": "4",
}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({}, PrefillTogether(60, 0)),
        ({"model": "openai/gpt-oss-120b"}, PrefillTogether(50, 10)),
        ({"engine": "sglang"}, None),
        ({"tp": "4", "dp": "1"}, None),  # attention of all GPUs for all requests
        ({"notes": INFERENCEX + "; disagg P=1x(tp1,dp4,ep4) D=1x(tp1,dp4,ep4)"}, None),
    ],
)
def test_scripts_say_which_ranks_prefill_together(write_table, cells, expected):
    plan = experiment(read_published(write_table(LONG | RANKS | cells))[0])
    assert plan.setup.together == expected
    if expected:
        assert plan.setup.replica(EngineConstants()).together == expected


def test_ttft_and_throughput_of_clients_have_the_way_to_the_scheduler(write_table):
    plan = experiment(read_published(write_table({}))[0])
    at_once, _ = play(replace(plan, reception=Reception()), EngineConstants())
    late, _ = play(replace(plan, reception=Reception(overlapped=True)), EngineConstants())
    # of ten requests of a client nine find a busy engine
    step_s = 0.9 * at_once["tpot_s"]
    assert late["ttft_s"] - at_once["ttft_s"] == pytest.approx(step_s)
    assert late["e2e_s"] - at_once["e2e_s"] == pytest.approx(step_s)
    assert late["tpot_s"] == at_once["tpot_s"]
    ratio = at_once["output_tokens_per_s"] / late["output_tokens_per_s"]
    assert ratio == pytest.approx(late["e2e_s"] / at_once["e2e_s"])
    assert front_end_s(1000) == REQUEST_S + 1000 * PROMPT_TOKEN_S


def test_poisson_arrivals_pay_for_the_front_end_and_batches_for_nothing(write_table):
    for cells, way_s in (
        ({"concurrency": "", "request_rate": "2"}, front_end_s(128)),
        ({"notes": "static batch"}, 0.0),
    ):
        plan = experiment(read_published(write_table(cells))[0])
        simulated, replay = play(plan, EngineConstants())
        assert simulated["ttft_s"] == pytest.approx(replay.ttft_s.mean() + way_s)


@pytest.mark.parametrize("clients", [4, 16])
def test_the_mean_wait_is_that_of_engines_that_form_steps_ahead(clients):
    replica = EngineSetup("H100-SXM-80GB", "Llama-3.1-8B").replica(EngineConstants())
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(820, 1025, (2, 10 * clients))
    at_once, ahead = (
        replay_closed([(replace(replica, async_scheduling=on), 1)], clients, prompt, output)
        for on in (False, True)
    )
    late_s = ahead.ttft_s.mean() - at_once.ttft_s.mean()
    # of ten requests of a client nine find a busy engine
    wait_s = 0.9 * Reception(overlapped=True).wait_steps(0.0) * at_once.tpot_s.mean()
    assert late_s == pytest.approx(wait_s, rel=0.15)
    assert ahead.tpot_s.mean() == pytest.approx(at_once.tpot_s.mean(), rel=2e-3)
