from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.costs.uncertainty import World
from servegym.errors import ConfigError
from servegym.validate.document import validation_document
from servegym.validate.engine import EngineConstants, EngineSetup
from servegym.validate.experiments import play
from servegym.validate.flags import extrapolations
from servegym.validate.published import experiment, read_published
from servegym.validate.ranking import kendall_tau, rankings
from servegym.validate.score import (
    Comparison,
    Validation,
    aggregate,
    aggregates,
    score_published,
    score_row,
    score_runs,
    worst,
)


def test_error_is_relative_to_the_measured_figure():
    assert Comparison(measured=8.0, simulated=6.0).error == -0.25


def test_aggregate_takes_the_size_of_errors_and_keeps_the_sign_in_the_bias():
    summed = aggregate([-0.3, -0.2, 0.1])
    assert summed.num_rows == 3
    assert summed.median == pytest.approx(0.2)
    assert summed.p90 == pytest.approx(0.28)  # 0.2 + 0.8 * (0.3 - 0.2)
    assert summed.bias == pytest.approx(-0.2)


def test_kendall_tau_counts_pairs_in_equal_and_opposite_order():
    measured = np.array([1.0, 2.0, 3.0, 4.0])
    assert kendall_tau(measured, measured) == 1
    assert kendall_tau(measured, -measured) == -1
    # of six pairs one is swapped: (5 - 1) / 6
    assert kendall_tau(measured, np.array([1.0, 2.0, 4.0, 3.0])) == pytest.approx(4 / 6)
    # one of six pairs is tied in one order only: (5 - 0) / sqrt(6 * 5)
    assert kendall_tau(measured, np.array([1.0, 2.0, 3.0, 3.0])) == pytest.approx(5 / 30**0.5)
    assert np.isnan(kendall_tau(measured, np.ones(4)))


def test_tau_of_the_same_work_compares_only_rows_with_equal_load(write_table):
    rows, _ = score_published(
        write_table(
            {"tpot_mean": "9", "concurrency": "1"},
            {"tpot_mean": "6", "concurrency": "1", "gpu": "h200_sxm"},
            {"tpot_mean": "5", "concurrency": "64"},  # wrong against the others, on purpose
        ),
        {},
    )
    (ranking,) = rankings(rows)
    assert (ranking.num_rows, ranking.num_pairs) == (3, 1)
    assert ranking.tau_same_work == 1
    assert ranking.tau == pytest.approx(-1 / 3)


def test_every_row_is_scored_or_listed_with_its_reason(write_table):
    table = write_table({}, {"gpu": "Gaudi9"}, {"model": "BERT"}, {"quality": "B"})
    rows, skipped = score_published(table, {})
    document = validation_document(Validation(rows=rows, skipped_rows=skipped))
    assert [row["row_id"] for row in document["rows"]] == ["1", "4"]
    assert [item["name"] for item in document["skipped_rows"]] == ["2", "3"]
    assert document["skipped_rows"][0]["reason"] == "unknown GPU 'Gaudi9'"
    assert list(aggregates(rows, lambda score: "all")) == [("all", "A"), ("all", "B")]


def test_worst_row_is_the_one_off_by_the_largest_factor_either_way(write_table):
    # the simulator says some thousand tokens a second: 5, 50 and 400 times off
    columns = ({"tpot_mean": "", "tput_out": str(rate)} for rate in (1_000, 100, 2_000_000))
    offline = ({**column, "concurrency": "", "request_rate": "inf"} for column in columns)
    rows, _ = score_published(write_table(*offline), {})
    assert [score.row.row_id for score in worst(rows, 2)] == ["3", "2"]


def test_model_that_does_not_fit_is_listed_not_simulated(write_table):
    rows, (skipped,) = score_published(
        write_table({"model": "Llama-3.1-70B", "tpot_mean": "60"}), {}
    )
    assert not rows
    assert "do not fit" in skipped.reason


def test_same_row_is_simulated_the_same_in_any_table(write_table):
    spread = {"notes": "ShareGPT 50 prompts", "concurrency": "", "request_rate": "3"}
    (alone,), _ = score_published(write_table(spread), {})
    (_, second), _ = score_published(write_table({}, spread), {})
    assert alone.figures == second.figures


def test_constants_add_to_every_step_and_sequence(write_table):
    plan = experiment(read_published(write_table({"concurrency": "2"}))[0])
    plain, _ = play(plan, EngineConstants())
    constants = EngineConstants(step_s=1e-3, sequence_s=1e-4, request_s=0.5)
    slower, _ = play(plan, constants)
    # two clients in step: every decode step has two sequences
    assert slower["tpot_s"] - plain["tpot_s"] == pytest.approx(1.2e-3, rel=1e-6)
    assert slower["ttft_s"] - plain["ttft_s"] > 0.5


def test_way_from_the_client_is_no_part_of_a_batch(write_table):
    plan = experiment(read_published(write_table({"notes": "static batch"}))[0])
    assert play(plan, EngineConstants(request_s=9.0))[0] == play(plan, EngineConstants())[0]


def test_trtllm_admits_only_what_it_can_hold_to_the_end(write_table):
    cells = {"engine": "TensorRT-LLM", "isl": "20000", "osl": "2000", "concurrency": "64"}
    plan = experiment(read_published(write_table(cells))[0])
    assert play(plan, EngineConstants())[1].num_preemptions == 0
    evicting = replace(plan, setup=replace(plan.setup, engine="vllm"))
    assert play(evicting, EngineConstants())[1].num_preemptions > 0


def test_drafts_make_a_row_faster_by_what_is_accepted(write_table):
    plan = experiment(read_published(write_table({}))[0])

    def tpot_s(*acceptance: float) -> float:
        drafted = replace(plan, setup=replace(plan.setup, acceptance=acceptance))
        return play(drafted, EngineConstants())[0]["tpot_s"]

    plain_s = tpot_s()
    assert tpot_s(0.0) > plain_s  # in vain
    assert tpot_s(0.8) < 0.8 * plain_s
    assert tpot_s(0.8, 0.6) < tpot_s(0.8)
    reasons = extrapolations(replace(plan.setup, acceptance=(0.8,)), "vllm")
    assert any("drafts was not measured" in reason for reason in reasons)


def test_ranks_that_draft_share_their_experts_and_are_off_as_a_whole():
    setup = EngineSetup(
        "H200-SXM-141GB", "DeepSeek-V3", precision="fp8", expert_ranks=8, acceptance=(0.8,)
    )
    kind = setup.replica(EngineConstants(step_s=1e-3))
    assert kind.shared is not None
    assert kind.speculation is not None
    assert kind.shared.num_ranks == 8
    plain = replace(setup, acceptance=()).replica(EngineConstants(step_s=1e-3))
    assert kind.num_blocks < plain.num_blocks
    assert kind.speculation.steps.cpu_s == plain.grid.cpu_s
    world = setup.replica(EngineConstants(), World(3))
    assert world.speculation is not None
    assert world.shared is not None
    assert not np.allclose(world.shared.experts_s, kind.shared.experts_s)
    with pytest.raises(ConfigError, match="drafts do not go with stages"):
        replace(setup, expert_ranks=1, tp=8, pp=2).replica(EngineConstants())


def test_run_is_scored_on_every_request_and_time(write_run):
    (score,), _ = score_runs(write_run(), {})
    assert score.figures["e2e_s", "p99"].measured == pytest.approx(0.6)
    assert score.figures["makespan_s", "whole"].measured == pytest.approx(2.6)
    assert score.figures["output_tokens_per_s", "whole"].measured == pytest.approx(33 / 2.6)
    assert score.figures["running", "time mean"].measured == 1
    assert score.replay.num_blocks == 500
    assert score.setup == EngineSetup("RTX-4090", "Llama-3.1-8B", max_num_seqs=8, num_blocks=500)


def test_independent_ranks_share_the_requests(write_run):
    (score,), _ = score_runs(write_run(data_parallel_size=2), {})
    assert score.setup.expert_ranks == 1
    assert score.replay.num_blocks == 2 * 500


def test_fp8_kv_cache_holds_twice_the_tokens_and_is_read_in_about_half_the_time():
    full, half = (
        EngineSetup("H100-SXM-80GB", "Llama-3.1-8B", kv_precision=kv).replica(EngineConstants())
        for kv in ("bf16", "fp8")
    )
    assert half.num_blocks == pytest.approx(2 * full.num_blocks, abs=2)
    ratio = half.grid.decode(64, 1e6) / full.grid.decode(64, 1e6)
    assert 0.45 < ratio < 0.6  # fitted on tables of either, each a few percent off


def test_rank_with_shared_experts_holds_more_tokens_than_an_engine_with_all():
    one = EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B").replica(EngineConstants())
    rank = EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B", expert_ranks=2).replica(EngineConstants())
    assert rank.num_blocks > one.num_blocks  # it holds half of the experts
    assert rank.grid.dense(64) < one.grid.dense(64)  # and computes none by itself


def test_row_scores_only_what_was_published(write_table):
    (row,) = read_published(write_table({"tpot_mean": "", "tput_out": "100"}))
    score = score_row(row, experiment(row), EngineConstants())
    assert set(score.figures) == {"ttft_s", "output_tokens_per_s"}
    assert score.main is score.figures["output_tokens_per_s"]


def test_sglang_keeps_a_closed_loop_in_waves(write_table):
    """Prefills pause decodes, so that clients stay together: long TTFT, and TPOT as of decodes."""
    cells = {"isl": "1000", "osl": "1000", "concurrency": "128"}
    figures = {}
    for label in ("SGLang", "vLLM"):
        plan = experiment(read_published(write_table({**cells, "engine": label}))[0])
        figures[label] = play(plan, EngineConstants())[0]
    assert figures["SGLang"]["ttft_s"] > 2 * figures["vLLM"]["ttft_s"]
    assert figures["SGLang"]["tpot_s"] < figures["vLLM"]["tpot_s"]
    assert figures["SGLang"]["e2e_s"] == pytest.approx(figures["vLLM"]["e2e_s"], rel=0.1)
