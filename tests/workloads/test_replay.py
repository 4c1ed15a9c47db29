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


def test_requests_beyond_the_context_are_refused_with_their_counts(trace):
    with pytest.raises(WorkloadError) as caught:
        TraceConfig(path=trace, max_context_tokens=60).whole()
    said = str(caught.value)
    assert said.startswith("squares.csv, line 57: a prompt of 56 and an output of 5 tokens")
    assert "145 of 200 requests" in said
    assert "by 10,585 tokens or 0.5 of all" in said  # 1 + 2 + ... + 145 of 21,100
    assert "--too-long" in said


def test_requests_are_left_out_and_counted_on_request(trace):
    read = TraceConfig(path=trace, max_context_tokens=60, too_long="skip").read()
    assert read.table.prompt_tokens.tolist() == list(range(1, 56))
    assert read.counts()["left_out_requests"] == 145
    assert read.counts()["cut_requests"] == 0
    assert read.counts()["tokens_not_played"] == sum(range(56, 201)) + 145 * 5
    assert read.remarks()[0].startswith("squares.csv: left out 145 of 200 requests, as they exceed")
    with pytest.raises(WorkloadError, match="as all others, exceeds 2 tokens"):
        TraceConfig(path=trace, max_context_tokens=2, too_long="skip").read()


def test_a_trace_within_the_context_is_played_as_it_is(trace):
    read = TraceConfig(path=trace, too_long="cut").read()
    assert read.shortened is None
    assert read.remarks() == []


def test_an_output_beyond_half_the_context_is_whole_where_it_fits(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,50\n1,10,80\n")
    read = TraceConfig(path=str(path), max_context_tokens=60, too_long="cut").read()
    assert read.table.output_tokens.tolist() == [50, 30]
    assert read.table.prompt_tokens.tolist() == [10, 10]
    assert read.counts()["cut_requests"] == 1
    assert read.counts()["tokens_not_played"] == 50


def test_requests_are_cut_to_the_context_on_request(trace):
    config = TraceConfig(path=trace, max_context_tokens=60, too_long="cut")
    table = config.whole()
    assert config.read().counts()["cut_requests"] == 145
    assert config.read().counts()["tokens_not_played"] == sum(range(1, 146))
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


@pytest.mark.parametrize("number", [0, 1])
def test_classes_of_the_trace_are_kept_also_where_all_are_of_one(tmp_path, number):
    header = "arrival_s,prompt_tokens,output_tokens,slo_class\n"
    path = tmp_path / "classes.csv"
    path.write_text(header + "".join(f"{i},1,1,{number}\n" for i in range(50)))
    table = TraceConfig(path=str(path)).table(rng(), num_requests=40, class_shares=(0.5, 0.5))
    assert table.slo_class.tolist() == [number] * 40


def test_classes_are_drawn_for_the_rows_without_alone(tmp_path):
    path = tmp_path / "some.jsonl"
    keys = '"arrival_s": {}, "prompt_tokens": 1, "output_tokens": 1'
    given = "{" + keys + ', "slo_class": 0}\n'
    without = "{" + keys + "}\n"
    path.write_text(
        "".join((given if i % 2 else without).replace("{}", str(i)) for i in range(400))
    )
    table = TraceConfig(path=str(path)).table(rng(), num_requests=400, class_shares=(0.5, 0.5))
    assert not table.slo_class[1::2].any()
    assert table.slo_class[::2].mean() == pytest.approx(0.5, abs=0.12)
