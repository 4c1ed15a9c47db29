"""Constants of engine families: found, and judged on what they were not fitted on."""

from __future__ import annotations

import pytest

from servegym.validate.constants import VARIANTS, fit_families, sample
from servegym.validate.engine import EngineConstants
from servegym.validate.experiments import play
from servegym.validate.published import experiment, read_published
from servegym.validate.score import aggregate
from servegym.validate.tables import fit_table, reach_table

SLOW = EngineConstants(step_s=4e-3)


@pytest.fixture
def slow_engines(write_table):
    """Rows of two sources and GPUs by an engine whose steps last 4 ms more than simulated."""
    cells = [
        {"file": file, "gpu": gpu, "concurrency": str(c)}
        for file, gpu in (("a", "h100_sxm"), ("a", "h200_sxm"), ("b", "h100_sxm"))
        for c in range(1, 9)
    ]
    plans = [experiment(row) for row in read_published(write_table(*cells))]
    for cell, plan in zip(cells, plans, strict=True):
        simulated, _ = play(plan, SLOW)
        cell |= {"tpot_mean": str(1e3 * simulated["tpot_s"])}
        cell |= {"ttft_mean": str(1e3 * simulated["ttft_s"] + 30)}
    return read_published(write_table(*cells))


def test_what_an_engine_adds_is_found_and_holds_where_it_was_not_fitted(slow_engines):
    (fit,), variants = fit_families(slow_engines)
    assert fit.constants.step_s == SLOW.step_s
    assert fit.constants.dense_factor == 1.0
    assert fit.constants.request_s == pytest.approx(0.030, abs=2e-3)
    assert fit.before > 0.2
    assert fit.after < 0.01
    assert [group.name for group in fit.sources] == ["a", "b"]
    assert [group.name for group in fit.gpus] == ["H100-SXM-80GB", "H200-SXM-141GB"]
    assert all(group.after < 0.01 < group.before for group in fit.sources + fit.gpus)
    assert set(variants) == set(VARIANTS)
    assert {len(scores) for scores in variants.values()} == {24}
    for name, low in (("none", False), ("family", True), ("source", True), ("GPU", True)):
        error = aggregate(score.main.error for score in variants[name])
        assert (error.median < 0.01) == low


def test_a_source_or_gpu_without_another_has_no_constants_to_be_scored_with(slow_engines):
    alone = [row for row in slow_engines if row.source == "a" and row.gpu == "h100_sxm"]
    (fit,), variants = fit_families(3 * alone)
    assert fit.after < 0.01
    assert [group.after for group in fit.sources + fit.gpus] == [None, None]
    assert variants["source"] == variants["GPU"] == variants["none"]
    assert fit_table([fit]).rows[0][-2:] == ("only one", "only one")


def test_few_rows_of_a_family_are_scored_without_constants(slow_engines):
    fits, variants = fit_families(slow_engines[:5])
    assert not fits
    assert variants["family"] == variants["none"]
    assert len(variants["none"]) == 5


def test_reach_counts_the_engines_and_gpus_of_the_aim(write_table):
    rows = [{}, {"gpu": "RTX4090", "tpot_mean": "99"}, {"quality": "C"}, {"engine": "DeepSpeed"}]
    _, variants = fit_families(read_published(write_table(*rows)))
    table = reach_table(variants)
    assert [row[:3] for row in table.rows] == [
        ("all", "TPOT", "1"),
        ("all but vllm-v0", "TPOT", "1"),
        ("vllm", "TPOT", "1"),
    ]


def test_sample_takes_of_every_source_and_gpu_and_the_same_each_time(write_table):
    many = [{"file": "many", "concurrency": str(c)} for c in range(1, 61)]
    few = [{"file": "few", "concurrency": str(c)} for c in range(1, 6)]
    other = [{"file": "many", "gpu": "h200_sxm"}, {"quality": "C"}, {"gpu": "unknown"}]
    rows = read_published(write_table(*many, *few, *other))
    drawn = sample(rows, 20)
    assert drawn == sample(rows, 20) != sample(rows, 20, seed=1)
    strata = [(row.source, row.gpu) for row in drawn]
    assert strata.count(("many", "h100_sxm")) == round(20 * 60 / 66)
    assert strata.count(("few", "h100_sxm")) == 3
    assert strata.count(("many", "h200_sxm")) == 1
    assert len(drawn) == len(set(row.row_id for row in drawn)) == len(strata)


def test_workers_that_prefill_for_others_are_not_fitted(write_table):
    notes = "1P1D, TP=1 per worker"
    fits, variants = fit_families(
        read_published(write_table({"notes": notes, "gpu_count": "2"}, {}))
    )
    assert [len(variants[name]) for name in VARIANTS] == [1] * len(VARIANTS)
    assert not fits
