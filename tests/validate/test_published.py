from __future__ import annotations

from dataclasses import replace

import pytest

from servegym.costs.pipeline import PipelineCost
from servegym.errors import ConfigError, WorkloadError
from servegym.validate.engine import EngineConstants, EngineSetup
from servegym.validate.published import experiment, read_published


def plan_of(write_table, **cells):
    return experiment(read_published(write_table(cells))[0])


def test_figures_are_read_in_seconds_and_only_those_given(write_table):
    (row,) = read_published(write_table({"tput_out": "480"}))
    assert row.measured == {"tpot_s": 0.008, "ttft_s": 0.02, "output_tokens_per_s": 480.0}


@pytest.mark.parametrize(
    ("notes", "e2e_ms", "measured"),
    [
        ("lengths random in [0.8,1.0]x nominal", 20 + 8 * 127, False),
        ("lengths random in [0.8,1.0]x nominal", 0.9 * (20 + 8 * 127), True),
        ("", 20 + 8 * 127, True),
    ],
)
def test_end_computed_from_the_nominal_length_is_no_measurement(
    write_table, notes, e2e_ms, measured
):
    cells = {"notes": notes, "osl": "128", "e2e_mean": str(e2e_ms)}
    (row,) = read_published(write_table(cells))
    assert ("e2e_s" in row.measured) is measured


def test_engines_that_wait_for_their_scheduler_pay_for_it(write_table):
    host_s = [
        plan_of(write_table, engine_version=version).setup.host_sequence_s
        for version in ("0.5.0", "0.12.0", "0.19.0")
    ]
    assert host_s == sorted(host_s, reverse=True)
    assert host_s[-1] == 0.0


def test_time_of_the_scheduler_lengthens_steps_by_their_sequences():
    setup = EngineSetup("H100-SXM-80GB", "Llama-3.1-8B")
    slow = replace(setup, host_sequence_s=1e-5)
    none, some = (s.replica(EngineConstants()).grid for s in (setup, slow))
    assert some.decode(64, 4096) - none.decode(64, 4096) == pytest.approx(64e-5)


def test_prefills_of_latent_attention_take_engines_in_python_as_long_as_they_launch(write_table):
    def least_s(**cells):
        plan = plan_of(write_table, gpu_count="8", tp="8", **cells)
        return plan.setup.replica(EngineConstants()).grid.eager_s

    large = {"model": "DeepSeek-V3", "precision_w": "fp8-block", "gpu": "H200-SXM-141GB"}
    assert least_s(engine="SGLang", **large) == pytest.approx(82.6e-3)
    assert least_s(engine="TensorRT-LLM", **large) == pytest.approx(82.6e-3)
    assert least_s(engine="vLLM", **large) == 0.0
    assert least_s(engine="SGLang") == 0.0


def test_random_tokens_fall_on_experts_unevenly(write_table):
    plan = plan_of(write_table, model="Qwen3-30B-A3B")
    assert plan.setup.cost().routing == "skewed"


def test_concurrency_makes_a_closed_loop_of_ten_requests_a_client(write_table):
    plan = plan_of(write_table)
    assert (plan.loop, plan.concurrency, plan.num_requests) == ("closed", 4, 40)
    assert (plan.setup.gpu, plan.setup.tp, plan.setup.precision) == ("H100-SXM-80GB", 1, "bf16")


def test_kv_cache_has_the_stated_precision_or_the_engine_default(write_table):
    fp8 = {"precision_w": "fp8", "engine": "TensorRT-LLM"}
    assert plan_of(write_table, **fp8).setup.kv_precision == "fp8"
    assert plan_of(write_table, **fp8, precision_kv="fp16").setup.kv_precision == "bf16"
    assert plan_of(write_table, precision_w="fp8").setup.kv_precision == "bf16"


@pytest.mark.parametrize(
    ("cells", "engine", "budget", "seqs"),
    [
        ({"engine": "vLLM"}, "vllm", 8192, 256),
        ({"engine": "vLLM", "engine_version": "0.6.3"}, "vllm-v0", 8192, 256),
        ({"engine": "vLLM", "engine_version": "0.6.3", "gpu": "MI300X"}, "vllm-v0", 8192, 256),
        ({"engine": "SGLang"}, "sglang", 8192, 2048),
        ({"engine": "SGLang", "gpu": "L40S", "tpot_mean": "90"}, "sglang", 4096, 2048),
        ({"engine": "SGLang", "gpu": "B200"}, "sglang", 16384, 2048),
        ({"engine": "TensorRT-LLM"}, "trtllm", 8192, 2048),
        ({"engine": "TGI"}, "vllm", 4096, 256),
    ],
)
def test_engine_follows_its_own_rules_with_its_own_limits(write_table, cells, engine, budget, seqs):
    setup = plan_of(write_table, **cells).setup
    assert setup.engine == engine
    assert (setup.max_num_batched_tokens, setup.max_num_seqs) == (budget, seqs)


def test_limits_in_the_notes_go_before_those_of_the_family(write_table):
    notes = "max_num_seqs=64 max_num_batched_tokens=512; kv blocks=100x32; prefix caching on"
    setup = plan_of(write_table, notes=notes).setup
    assert (setup.max_num_seqs, setup.max_num_batched_tokens) == (64, 512)
    assert (setup.num_blocks, setup.block_size, setup.prefix_caching) == (100, 32, True)
    assert plan_of(write_table, notes="chunked_prefill=FALSE").setup.chunked_prefill is False


def test_vllm_v0_that_chunks_prompts_forms_steps_as_v1_does(write_table):
    old = {"engine_version": "0.6.3", "notes": "chunked_prefill=TRUE"}
    assert plan_of(write_table, **old).setup.rules == "vllm"
    assert plan_of(write_table, **old | {"notes": ""}).setup.rules == "vllm-v0"


def test_means_in_the_notes_go_before_nominal_lengths(write_table):
    plan = plan_of(write_table, isl="2048", osl="128", notes="(mean in=2046, out=49; early EOS)")
    assert (plan.prompt_tokens, plan.output_tokens) == (2046, 49)


def test_disaggregated_row_has_workers_of_their_own_degrees(write_table):
    notes = "disagg P=2x(tp1,dp4,ep4) D=3x(tp4,dp1,ep4)"
    row = {"notes": notes, "model": "Qwen3-30B-A3B", "gpu_count": "20", "tp": "4"}
    plan = plan_of(write_table, **row)
    assert (plan.num_prefill, plan.prefill.tp, plan.prefill.expert_ranks) == (2, 1, 4)
    assert (plan.num_workers, plan.setup.tp, plan.setup.expert_groups) == (3, 4, 4)
    with pytest.raises(ConfigError, match="several replicas"):
        plan_of(write_table, **row | {"model": "Llama-3.1-8B"})


def test_row_with_stages_has_batches_in_flight_and_the_blocks_of_the_tightest(write_table):
    row = {"pp": "2", "gpu_count": "2", "model": "Llama-3.1-70B", "tpot_mean": "60"}
    replica = plan_of(write_table, **row, precision_w="fp8").setup.replica(EngineConstants())
    assert (replica.name, replica.num_stages, replica.num_gpus) == ("H100-SXM-80GB x1 pp2", 2, 2)
    setup = plan_of(write_table, **row, precision_w="fp8").setup
    capacity = PipelineCost(setup.cost(), 2).kv_capacity_tokens(setup.memory_fraction)
    assert replica.num_blocks == capacity // 16
    with pytest.raises(ConfigError, match=r"must be vllm or trtllm.*got sglang"):
        plan_of(write_table, **row, engine="SGLang").setup.replica(EngineConstants())


def test_what_an_engine_family_adds_to_a_step_every_stage_pays(write_table):
    setup = plan_of(write_table, pp="2", gpu_count="2").setup
    plain, slow = (setup.replica(EngineConstants(step_s=s)).pipeline for s in (0.0, 1e-3))
    work = [one.stage_s([], 4, 4000) for one in (plain, slow)]
    assert work[1] == pytest.approx([s + 1e-3 for s in work[0]], rel=1e-12)


def test_notes_tell_a_static_batch_from_clients(write_table):
    plan = plan_of(write_table, notes="static batch offline")
    assert (plan.loop, plan.num_requests) == ("batch", 4)


def test_rate_makes_an_open_loop(write_table):
    plan = plan_of(write_table, concurrency="", request_rate="~10 Poisson (300 req)")
    assert (plan.loop, plan.rate_rps) == ("open", 10.0)


def test_infinite_rate_queues_everything_at_once(write_table):
    plan = plan_of(write_table, concurrency="", request_rate="inf (all queued)", isl="2000")
    assert (plan.loop, plan.num_requests) == ("offline", 3000)


@pytest.mark.parametrize(
    ("notes", "lengths"),
    [
        ("lengths random in [0.8,1.0]x nominal", "shortened"),
        ("ShareGPT 200 prompts, Poisson", "spread"),
        ("", "fixed"),
    ],
)
def test_notes_tell_how_lengths_are_spread(write_table, notes, lengths):
    assert plan_of(write_table, notes=notes).lengths == lengths


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"gpu": "Gaudi9"}, "unknown GPU"),
        ({"model": "BERT"}, "unknown model"),
        ({"precision_w": "int4_wo"}, "not modelled"),
        ({"engine": "sambaflow"}, "engine 'sambaflow'"),
        ({"isl": ""}, "lengths are not given"),
        ({"tp": ""}, "degree not given"),
        ({"pp": "2"}, "1 GPUs for tp 1 and pp 2"),
        ({"dp": "8"}, "data-parallel"),
        ({"ep": "8"}, "expert parallelism"),
        ({"gpu_count": "8"}, "8 GPUs for tp 1"),
        ({"notes": "disagg P=1x D=1x"}, "workers that are not described"),
        ({"notes": "1P1D, TP=1 per worker", "gpu_count": "3"}, "3 GPUs for workers of 2"),
        ({"concurrency": ""}, "neither concurrency nor request rate"),
        ({"tpot_mean": "", "ttft_mean": ""}, "no TPOT"),
        ({"quality": "X"}, "graded X"),
        # 15 GB of weights at 3.35 TB/s: 4.5 ms
        ({"tpot_mean": "4.2"}, "inconsistent"),
        ({"tpot_mean": "", "tput_out": "1000"}, "inconsistent"),  # 4 clients: 4 ms each
    ],
)
def test_row_is_refused_with_the_reason(write_table, cells, reason):
    with pytest.raises(ConfigError, match=reason):
        plan_of(write_table, **cells)


def test_file_is_refused_when_it_is_missing_or_no_such_table(tmp_path):
    with pytest.raises(WorkloadError, match="no file at"):
        read_published(tmp_path / "nothing.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(WorkloadError, match="no column row_id"):
        read_published(other)
