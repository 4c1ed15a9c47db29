"""Corrections interpolate in logarithms; curves through measured times never fall."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.assets.specs import Correction, KernelFit
from servegym.costs import forms
from servegym.costs.curve import Surface
from servegym.costs.forms import LogTable


def test_a_correction_is_linear_in_logarithms_and_constant_beyond_its_knots():
    table = LogTable.of(Correction(axes={"m": (1.0, 100.0)}, percent=(0, 20)))
    at = np.array([0.01, 1.0, 10.0, 100.0, 1e6])
    assert table({"m": at}) == pytest.approx([0.0, 0.0, 0.1, 0.2, 0.2])


def test_a_correction_over_two_coordinates_is_bilinear():
    table = LogTable.of(Correction(axes={"m": (1, 4), "n": (1, 4)}, percent=(0, 10, 20, 70)))
    # half way along both: the mean of the corners
    assert table({"m": np.array(2.0), "n": np.array(2.0)}) == pytest.approx(0.25)


def test_a_time_is_form_times_correction():
    fit = KernelFit(c0_s=1.0, eff_bytes=0.5)
    table = LogTable.of(Correction(axes={"batch": (1, 2)}, percent=(10, 10)))
    # K and V of 3 tokens, 2 heads of 4 elements: 96 bytes at half of 8 bytes/s: 24 s
    operator = forms.decode(1, 3, 2, 2, 4)
    assert operator.form_s(fit, 1.0, 8.0) == pytest.approx(25.0)
    assert operator.measured_s(fit, table, 1.0, 8.0) == pytest.approx(25.0 * np.exp(0.1))
    # what no cache holds: the 96 bytes at the reached bandwidth
    assert operator.floor_s(fit, 1.0, 8.0) == pytest.approx(24.0)


def test_small_data_is_read_from_the_cache_of_a_benchmark_large_data_is_not():
    fit = KernelFit(c0_s=0.0, eff_bytes=1.0, cache_bytes=1000.0, cache_speedup=4.0)
    small, large = (forms.decode(1, tokens, 1, 1, 1) for tokens in (25, 2500))  # 100, 10,000 bytes
    assert small.form_s(fit, 1.0, 1.0) == pytest.approx(25.0, rel=1e-6)
    assert large.form_s(fit, 1.0, 1.0) == pytest.approx(10_000.0, rel=1e-6)


def test_a_chunk_over_a_context_is_looked_up_where_pairs_and_query_tiles_agree():
    chunk, context, heads = 64.0, 480.0, 32.0
    at = forms.prefill(chunk, context, heads, 8, 128).coordinates
    assert at["length"] * at["heads"] == chunk * heads  # query tiles
    # pairs, without the half token of the diagonal
    assert at["heads"] * at["length"] ** 2 / 2 == heads * chunk * (context + chunk / 2)


def test_even_routing_touches_an_expert_a_row_uniform_routing_fewer():
    even = forms.experts(3, 1, 1, 4, 1, 1, 1.0, even=True)
    uniform = forms.experts(3, 1, 1, 4, 1, 1, 1.0)
    # weights of 3 experts against 4 (1 - (3/4)^3) = 2.3125 of them, and 3 rows in and out
    assert even.num_bytes - uniform.num_bytes == pytest.approx(3 - 2.3125)


def test_a_surface_takes_the_running_maximum_and_is_straight_in_logarithms():
    x, y = np.array([1.0, 4.0, 16.0]), np.array([1.0, 4.0])
    surface = Surface.through(x, y, np.array([[1.0, 4.0], [0.5, 8.0], [2.0, 2.0]]))
    assert [surface(1, 1), surface(4, 1), surface(16, 1)] == pytest.approx([1, 1, 2])
    assert [surface(4, 4), surface(16, 4)] == pytest.approx([8, 8])
    assert surface(1, 2) == pytest.approx(2.0)  # half way from 1 to 4
    assert surface(64, 1) == pytest.approx(4.0)  # the last slope goes on
    assert surface(0.1, 1) == pytest.approx(1.0)  # before the first knot nothing is gained


def unpacked(batch, kv_tokens, *, l2_bytes=1e9, num_sms=4):
    """8 query heads on 2 KV heads of 4 elements."""
    return forms.unpacked_decode(batch, kv_tokens, 8, 2, 4, l2_bytes, num_sms)


def test_an_unpacked_decode_computes_a_whole_tile_for_every_query_head():
    # 2 products of 64 rows and 4 elements with each of 100 tokens, for 8 heads; twice for
    # multiplication and addition
    assert unpacked(2, 100).flops == pytest.approx(4 * 64 * 4 * 8 * 100)


def test_few_unpacked_decodes_leave_multiprocessors_idle():
    # one sequence has 8 tiles for 32 multiprocessors
    assert unpacked(1, 100, num_sms=32).flops == pytest.approx(4 * 4 * 64 * 4 * 8 * 100)
    assert unpacked(8, 100, num_sms=32).flops == pytest.approx(4 * 64 * 4 * 8 * 100)


def test_heads_of_a_group_read_keys_again_if_no_cache_holds_them_and_they_run_one_by_one():
    once = 4 * 4 * 2 * 100  # K and V of 2 KV heads in 2 bytes
    assert unpacked(100, 100).num_bytes == pytest.approx(once)
    assert unpacked(100, 100, l2_bytes=1.0).num_bytes == pytest.approx(4 * once)
    # as many multiprocessors as a group has tiles: its heads run at the same time
    assert unpacked(100, 100, l2_bytes=1.0, num_sms=400).num_bytes == pytest.approx(once)
