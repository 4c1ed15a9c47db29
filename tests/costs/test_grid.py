"""The compiled grid: linear between its knots, true to the step cost, strict about its form."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from servegym.assets.specs import gpu, gpu_names, model, model_names
from servegym.costs.grid import (
    NUM_BATCH_KNOTS,
    NUM_CHUNK_KNOTS,
    NUM_CONTEXT_KNOTS,
    NUM_DENSE_KNOTS,
    NUM_KV_KNOTS,
    CostGrid,
)
from servegym.costs.step import StepCost
from servegym.errors import ConfigError


def toy_grid(**changes):
    """Dense term 1 ms a token; attention 1 us a pair of tokens; decode 1 ms a sequence."""
    dense = np.arange(1.0, NUM_DENSE_KNOTS + 1)
    chunk, context = 4.0 * np.arange(NUM_CHUNK_KNOTS), 4.0 * np.arange(NUM_CONTEXT_KNOTS)
    batch, kv = np.arange(1.0, NUM_BATCH_KNOTS + 1), 10.0 * np.arange(NUM_KV_KNOTS)
    columns = {
        "cpu_s": 0.5,
        "dense_tokens": dense,
        "dense_s": 1e-3 * dense,
        "prefill_chunk": chunk,
        "prefill_context": context,
        "prefill_s": 1e-6 * np.outer(chunk, context),
        "decode_batch": batch,
        "decode_kv": kv,
        "decode_s": np.add.outer(1e-3 * batch, 1e-6 * kv),
    }
    return CostGrid(**{**columns, **changes})


def test_a_step_adds_cpu_dense_chunks_and_decodes():
    # 5 + 7 prompt tokens and 3 decodes: 15 tokens of 1 ms; pairs 5 * 6 and 7 * 10;
    # 3 decodes of 1 ms and 55 KV tokens of 1 us
    step_s = toy_grid().step_s([(5, 6), (7, 10)], num_decodes=3, kv_tokens=55)
    assert step_s == pytest.approx(0.5 + 0.015 + 30e-6 + 70e-6 + 0.003 + 55e-6)


def test_decodes_beside_a_chunk_cost_what_mixed_steps_cost():
    grid = toy_grid()
    dearer = toy_grid(mixed_s=3.0 * grid.decode_s)
    alone, beside = ({"chunks": c, "num_decodes": 3, "kv_tokens": 55} for c in ([], [(5, 6)]))
    assert dearer.step_s(**alone) == grid.step_s(**alone)
    assert dearer.step_s(**beside) - grid.step_s(**beside) == pytest.approx(2 * (0.003 + 55e-6))
    assert dearer.step_s([(5, 6)]) == grid.step_s([(5, 6)])


def test_decodes_beside_chunks_pay_for_the_longest_of_them():
    grid, tiles = toy_grid(), toy_grid(empty_tiles_s=1e-4)
    for chunks, longest in (([], 0), ([(5, 6)], 5), ([(5, 6), (7, 0)], 7)):
        added = tiles.step_s(chunks, 3, 55) - grid.step_s(chunks, 3, 55)
        assert added == pytest.approx(1e-4 * 3 * longest)
        assert tiles.step_s(chunks) == grid.step_s(chunks)


def test_a_step_without_decodes_pays_none():
    assert toy_grid().step_s([(5, 0)]) == pytest.approx(0.5 + 0.005)


def test_terms_go_on_with_their_last_slope():
    grid = toy_grid()
    assert grid.dense(1000) == pytest.approx(1.0)
    assert grid.decode(100, 1e6) == pytest.approx(0.1 + 1.0)
    assert grid.prefill(100, 1000) == pytest.approx(0.1)


def test_a_kink_at_a_knot_is_kept():
    dense_s = np.full(NUM_DENSE_KNOTS, 0.01)
    dense_s[10:] = 0.01 + 1e-3 * np.arange(NUM_DENSE_KNOTS - 10)  # flat to 11 tokens, then 1 ms
    grid = toy_grid(dense_s=dense_s)
    assert [grid.dense(t) for t in (5.5, 11, 13.5)] == pytest.approx([0.01, 0.01, 0.0125])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_s": np.ones(3)}, "dense_s must have shape"),
        ({"decode_s": np.ones((NUM_KV_KNOTS, NUM_BATCH_KNOTS))}, "decode_s must have shape"),
        ({"dense_tokens": np.ones(NUM_DENSE_KNOTS)}, "knots dense_tokens must ascend"),
        ({"decode_kv": -10.0 * np.arange(NUM_KV_KNOTS)}, "decode_kv must be finite"),
        ({"dense_s": np.full(NUM_DENSE_KNOTS, np.nan)}, "dense_s must be finite"),
        ({"cpu_s": -1.0}, "cpu_s must be finite and not negative, got -1"),
        ({"cpu_s": 0.0, "dense_s": np.zeros(NUM_DENSE_KNOTS)}, "longer than 0 s"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_malformed_grid_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(toy_grid(), **change)


# ---- against the step cost ----


@cache
def compiled(gpu_name, model_name, max_tokens):
    cost = StepCost(gpu(gpu_name), model(model_name))
    return cost, cost.compile(max_tokens=max_tokens)


def exact_s(cost, chunk, context, batch, kv_tokens):
    return sum(cost.terms(chunk + batch, chunk, context, batch, kv_tokens).values())


def errors_of_the_grid(seed, names):
    """Relative errors at points drawn once: Hypothesis' depend on which modules are loaded."""
    rng, errors = np.random.default_rng(seed), []
    for _ in range(24):  # what takes time is to make a grid
        cost, grid = compiled(str(rng.choice(gpu_names())), str(rng.choice(names)), 2048)
        for _ in range(30):
            chunk, context = int(rng.integers(1, 1793)), int(rng.integers(0, 131_073))
            batch = int(rng.integers(0, 257))
            kv_tokens = batch * int(rng.integers(1, 15_001))
            expected = exact_s(cost, chunk, context, batch, kv_tokens)
            got = grid.step_s([(chunk, context)], batch, kv_tokens)
            errors.append(abs(got / expected - 1))
    return errors


WINDOWED = [name for name in model_names() if model(name).window_layers]


def test_the_grid_is_within_2_percent_of_the_step_cost():
    errors = errors_of_the_grid(0, [name for name in model_names() if name not in WINDOWED])
    assert np.quantile(errors, 0.99) < 0.01
    assert max(errors) < 0.02


def test_with_sliding_windows_it_is_within_5_percent():
    """The cost bends where windows are full: along a diagonal, which no grid of axes follows."""
    errors = errors_of_the_grid(0, WINDOWED)
    assert np.quantile(errors, 0.97) < 0.02
    assert max(errors) < 0.05


def test_a_mixed_step_bends_where_tiles_fill_the_multiprocessors():
    cost, grid = compiled("RTX-4090", "Qwen2.5-72B", 2048)
    assert gpu("RTX-4090").num_sms == 128
    assert 128 in grid.decode_batch  # tiles of one head of every sequence fill them
    for batch in (121, 127, 128, 140):
        expected = exact_s(cost, 1, 0, batch, 8192 * batch)
        assert grid.step_s([(1, 0)], batch, 8192 * batch) == pytest.approx(expected, rel=0.005)


@pytest.mark.parametrize("model_name", model_names())
@pytest.mark.parametrize("max_tokens", [512, 2048, 8192])
def test_whole_prompts_are_within_2_percent_up_to_the_budget(model_name, max_tokens):
    cost, grid = compiled("H100-SXM-80GB", model_name, max_tokens)
    chunks = np.unique(np.geomspace(1, max_tokens, 120).astype(int)).tolist()
    expected = [exact_s(cost, chunk, 0, 0, 0) for chunk in chunks]
    assert [grid.step_s([(chunk, 0)]) for chunk in chunks] == pytest.approx(expected, rel=0.02)


def test_pure_decode_is_within_1_percent_but_for_kinks_between_knots():
    rng, errors = np.random.default_rng(0), []
    for _ in range(24):
        cost, grid = compiled(rng.choice(gpu_names()), rng.choice(model_names()), 2048)
        for _ in range(25):
            batch, kv_of_each = int(rng.integers(1, 257)), int(rng.integers(1, 15_001))
            expected = sum(cost.terms(batch, batch=batch, kv_tokens=batch * kv_of_each).values())
            errors.append(abs(grid.step_s([], batch, batch * kv_of_each) / expected - 1))
    # sliding windows and caches bend the cost where no knot is
    assert np.percentile(errors, 98) < 0.01
    assert max(errors) < 0.03


def test_two_chunks_cost_their_attention_each_and_the_rest_once():
    cost, grid = compiled("A100-SXM-80GB", "Llama-3.1-8B", 2048)
    attention = "prefill attention"
    expected = (
        sum(cost.terms(600).values())
        + cost.terms(1, chunk=200, context=1000)[attention]
        + cost.terms(1, chunk=400)[attention]
    )
    assert grid.step_s([(200, 1000), (400, 0)]) == pytest.approx(expected, rel=0.02)


def test_a_step_with_a_chunk_is_not_shorter_than_its_launches():
    grid = toy_grid()
    chunk_s, decode_s = grid.step_s([(16, 0)], 2, 64), grid.step_s([], 2, 64)
    eager = toy_grid(eager_s=2.0 * chunk_s)
    assert eager.step_s([(16, 0)], 2, 64) == 2.0 * chunk_s
    assert eager.step_s([], 2, 64) == decode_s
    assert toy_grid(eager_s=0.5 * chunk_s).step_s([(16, 0)], 2, 64) == chunk_s
