"""Replayed traces: windows by seed, rates by load."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.config import TraceConfig


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def trace(tmp_path):
    """200 requests; request i has i + 1 prompt tokens and arrives at i^2 / 100 seconds."""
    path = tmp_path / "squares.csv"
    lines = [f"{i * i / 100},{i + 1},5" for i in range(200)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines))
    return str(path)


def test_a_window_holds_successive_requests_from_time_0(trace):
    table = TraceConfig(path=trace).table(rng(), num_requests=50)
    first = int(table.prompt_tokens[0]) - 1
    i = np.arange(first, first + 50)
    assert table.prompt_tokens.tolist() == (i + 1).tolist()
    np.testing.assert_allclose(table.arrival_s, (i**2 - first**2) / 100, atol=1e-9)


def test_seeds_choose_windows_all_over_the_trace(trace):
    config = TraceConfig(path=trace)
    first = [int(config.table(rng(s), num_requests=50).prompt_tokens[0]) for s in range(100)]
    assert min(first) >= 1
    assert max(first) <= 151
    assert min(first) < 20
    assert max(first) > 130
    assert len(set(first)) > 50


def test_a_seed_always_chooses_the_same_window(trace):
    config = TraceConfig(path=trace)
    a, b = (config.table(rng(3), num_requests=50) for _ in range(2))
    assert a.arrival_s.tobytes() == b.arrival_s.tobytes()
    assert a.prompt_tokens.tobytes() == b.prompt_tokens.tobytes()


def test_load_shortens_all_gaps_alike(trace):
    config = TraceConfig(path=trace)
    once, thrice = (config.table(rng(), num_requests=50, load=load) for load in (1.0, 3.0))
    np.testing.assert_allclose(thrice.arrival_s, once.arrival_s / 3)
    assert thrice.prompt_tokens.tolist() == once.prompt_tokens.tolist()


def test_a_rate_is_that_of_the_whole_trace(trace):
    # 199 gaps in 199^2 / 100 s: 100 / 199 requests a second by itself
    table = TraceConfig(path=trace, rate_rps=25.0).table(rng(), num_requests=200)
    assert table.rate_rps == pytest.approx(25.0)
    own = TraceConfig(path=trace).table(rng(), num_requests=200)
    assert own.rate_rps == pytest.approx(100 / 199)


def test_a_short_trace_is_played_whole(trace):
    assert len(TraceConfig(path=trace).table(rng(), num_requests=1000)) == 200


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "growing.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,1,1\n")
    config = TraceConfig(path=str(path))
    assert len(config.whole()) == 2
    assert config.whole() is config.whole()
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,1,1\n2,1,1\n")
    assert len(config.whole()) == 3


@pytest.mark.parametrize("rows", ["3,1,1\n", "3,1,1\n3,1,1\n"], ids=["one request", "one instant"])
def test_a_rate_of_a_single_time_is_refused(tmp_path, rows):
    path = tmp_path / "one.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    with pytest.raises(WorkloadError, match=r"one\.csv cannot be played at rate_rps 5"):
        TraceConfig(path=str(path), rate_rps=5.0).table(rng(), num_requests=1)
    assert TraceConfig(path=str(path)).table(rng(), num_requests=1).arrival_s.tolist() == [0.0]


def test_requests_are_cut_to_the_context(trace):
    config = TraceConfig(path=trace, max_context_tokens=60)
    table = config.whole()
    total = table.prompt_tokens + table.output_tokens
    assert total.max() == 60
    uncut = np.arange(1, 201) + 5 <= 60
    assert table.prompt_tokens[uncut].tolist() == list(range(1, 56))


def test_classes_are_drawn_by_share_for_a_trace_without(trace):
    table = TraceConfig(path=trace).table(rng(), num_requests=200, class_shares=(0.5, 0.5))
    assert table.slo_class.mean() == pytest.approx(0.5, abs=0.12)


def test_a_conversation_of_a_trace_is_of_one_class(tmp_path):
    path = tmp_path / "sessions.csv"
    rows = "\n".join(f"{i},1,1,{i % 10 if i % 2 else ''}" for i in range(400))
    path.write_text("arrival_s,prompt_tokens,output_tokens,session\n" + rows)
    table = TraceConfig(path=str(path)).table(rng(), num_requests=400, class_shares=(0.5, 0.5))
    for session in (1, 3, 5, 7, 9):
        assert len(set(table.slo_class[table.session == session].tolist())) == 1
    assert table.slo_class[table.session < 0].mean() == pytest.approx(0.5, abs=0.12)


def test_classes_of_the_trace_are_kept(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,slo_class\n0,1,1,1\n1,1,1,0\n2,1,1,1\n")
    table = TraceConfig(path=str(path)).table(rng(), num_requests=3, class_shares=(0.9, 0.1))
    assert table.slo_class.tolist() == [1, 0, 1]
