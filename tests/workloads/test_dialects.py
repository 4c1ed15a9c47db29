"""What a trace's numbers count is known from its columns and counts, or asked for."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.readers import read_trace

RATE_RPS = 4.0


def write_rows(path, *, block, per_second=1.0, digits=3, columns=lambda i: {}, num=300):
    """Requests of distinct prompts with a hash for each block, four a second."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.exponential(1 / RATE_RPS, num))
    lines, first = [], 0
    for i, time_s in enumerate(times.tolist()):
        prompt = int(rng.integers(100, 4000))
        count = -(-prompt // block)
        row = {
            "timestamp": round(time_s * per_second, digits),
            "input_length": prompt,
            "output_length": 5,
            "hash_ids": list(range(first, first + count)),
        }
        first += count
        lines.append(json.dumps(row | columns(i)))
    path.write_text("\n".join(lines))
    return path


def bailian(i):
    return {"chat_id": i, "parent_chat_id": i - 1 if i % 3 else -1, "type": "text", "turn": i % 3}


def test_bailian_columns_mean_seconds_and_blocks_of_16_and_say_so(tmp_path):
    path = write_rows(tmp_path / "qwen.jsonl", block=16, columns=bailian)
    trace = read_trace(path)
    assert trace.table.rate_rps == pytest.approx(RATE_RPS, rel=0.2)
    assert (trace.time_unit, trace.hash_block_tokens) == ("s", 16)
    assert set(trace.table.prefix_ends[:3].tolist()) == {16, 32, 48}
    assert "Qwen's Bailian" in trace.remarks()[0]
    # three turns a chat, each the child of the one before
    assert trace.table.session[:7].tolist() == [0, 0, 0, 3, 3, 3, 6]


def test_seconds_under_mooncakes_names_are_refused_by_line_with_both_rates(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", block=16)
    with pytest.raises(WorkloadError) as caught:
        read_trace(path)
    said = str(caught.value)
    assert "a.jsonl, line 1: " in said
    assert "16 tokens a hash" in said
    assert "--time-unit" in said
    assert re.search(r"\(s: [34]\.\d+ requests/s, ms: [34],\d+ requests/s\)", said)


@pytest.mark.parametrize("given", [{}, {"hash_block_tokens": 16}], ids=["guessed", "given"])
def test_with_the_unit_given_the_block_size_is_found_by_the_counts(tmp_path, given):
    trace = read_trace(write_rows(tmp_path / "a.jsonl", block=16), time_unit="s", **given)
    assert trace.hash_block_tokens == 16
    assert trace.table.rate_rps == pytest.approx(RATE_RPS, rel=0.2)
    said = [] if given else ["a.jsonl: a hash covers 16 tokens, which all of its counts fit"]
    assert trace.remarks() == said


def test_mooncakes_own_files_are_read_without_a_word(tmp_path):
    trace = read_trace(write_rows(tmp_path / "a.jsonl", block=512, per_second=1000, digits=None))
    assert (trace.time_unit, trace.hash_block_tokens, trace.remarks()) == ("ms", 512, [])
    assert trace.table.rate_rps == pytest.approx(RATE_RPS, rel=0.2)


@pytest.mark.parametrize(
    ("unit", "per_second"), [("s", 1.0), ("ms", 1e3), ("us", 1e6), ("ns", 1e9)]
)
def test_every_unit_gives_the_same_stream(tmp_path, unit, per_second):
    path = write_rows(tmp_path / "a.jsonl", block=512, per_second=per_second, digits=6)
    table = read_trace(path, time_unit=unit).table
    exact = read_trace(write_rows(tmp_path / "b.jsonl", block=512, digits=6), time_unit="s").table
    np.testing.assert_allclose(table.arrival_s, exact.arrival_s, atol=2e-6)


def test_fractions_of_milliseconds_are_not_mooncakes(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", block=512)
    with pytest.raises(WorkloadError, match=r"a\.jsonl, line 1: timestamp .* no whole number of"):
        read_trace(path)


def test_a_count_of_hashes_that_fits_no_size_is_refused_by_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", block=512, per_second=1000, digits=None)
    lines = path.read_text().splitlines()
    row = json.loads(lines[6])
    lines[6] = json.dumps(row | {"hash_ids": row["hash_ids"] + [1, 2]})
    path.write_text("\n".join(lines))
    with pytest.raises(WorkloadError, match=r"a\.jsonl, line 7: \d+ hashes for a prompt of"):
        read_trace(path)
    trace = read_trace(path, on_bad_row="skip")
    assert (len(trace.table), trace.num_skipped) == (299, 1)
    assert "line 7" in trace.first_bad


def test_a_size_that_does_not_fit_the_counts_is_refused_also_if_given(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", block=16)
    with pytest.raises(WorkloadError, match=r"line 1: .* at 32 tokens a hash it has"):
        read_trace(path, time_unit="s", hash_block_tokens=32)


def test_missing_hashes_in_some_rows_are_refused(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl",
        block=512,
        per_second=1000,
        digits=None,
        columns=lambda i: {"hash_ids": []} if i == 4 else {},
    )
    with pytest.raises(WorkloadError, match=r"line 5: 0 hashes for a prompt of"):
        read_trace(path)


def test_mooncakes_names_without_hashes_say_how_they_were_read(tmp_path):
    path = tmp_path / "a.jsonl"
    row = '{"timestamp": %d, "input_length": 9, "output_length": 1}\n'
    path.write_text("".join(row % (1000 * i) for i in range(9)))
    trace = read_trace(path)
    assert trace.table.rate_rps == 1.0
    assert "milliseconds" in trace.remarks()[0]
    assert read_trace(path, time_unit="s").remarks() == []
    with pytest.raises(WorkloadError, match="no hashes"):
        read_trace(path, hash_block_tokens=16)


@pytest.mark.parametrize("column", ["timestamp", "Timestamp"])
def test_a_column_that_says_no_unit_is_asked_for(tmp_path, column):
    path = tmp_path / "a.csv"
    path.write_text(f"{column},prompt_tokens,output_tokens\n0,5,5\n1,5,5\n2,5,5\n")
    said = rf"a\.csv: column {column} does not say .*--time-unit.*\(s: 1 requests/s, ms: 1,000"
    with pytest.raises(WorkloadError, match=said):
        read_trace(path)
    assert read_trace(path, time_unit="s").table.rate_rps == 1.0
    assert read_trace(path, time_unit="ms").table.rate_rps == 1000.0


def test_a_unit_against_the_name_of_the_column_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,5\n1,5,5\n")
    with pytest.raises(WorkloadError, match="arrival_s, seconds by its name"):
        read_trace(path, time_unit="ms")


def test_azures_column_may_hold_numbers_if_their_unit_is_given(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n0,5,5\n500,5,5\n")
    assert read_trace(path, time_unit="ms").table.arrival_s.tolist() == [0.0, 0.5]


def test_two_dialects_in_one_file_are_refused_by_line(tmp_path):
    path = tmp_path / "a.jsonl"
    first = {"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 5}
    second = {"timestamp": 1000, "input_length": 5, "output_length": 5}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(WorkloadError, match=r"a\.jsonl, line 2 .* than a\.jsonl, line 1"):
        read_trace(path)


def test_hashes_of_the_native_form_cover_leading_blocks_at_most(tmp_path):
    path = tmp_path / "a.csv"
    header = "arrival_s,prompt_tokens,output_tokens,prefix_hashes\n"
    path.write_text(header + "0,1500,5,1\n1,1500,5,1 2 3\n")
    assert read_trace(path).table.prefix_offsets.tolist() == [0, 1, 4]
    path.write_text(header + "0,1500,5,1\n1,1500,5,1 2 3 4\n")
    with pytest.raises(WorkloadError, match=r"line 3: 4 hashes .* at most 3"):
        read_trace(path)


def test_a_chat_that_follows_itself_is_refused(tmp_path):
    ring = {0: 1, 1: 0}
    path = write_rows(
        tmp_path / "a.jsonl",
        block=16,
        num=2,
        columns=lambda i: bailian(i) | {"parent_chat_id": ring[i]},
    )
    with pytest.raises(WorkloadError, match="follows itself"):
        read_trace(path)


@pytest.mark.parametrize(("unit", "first"), [("s", 1.7e9), ("us", 1.7e15), ("ns", 1.7e18)])
def test_times_since_1970_in_another_unit_are_refused_by_line(tmp_path, unit, first):
    path = tmp_path / "a.jsonl"
    row = {"input_length": 100, "output_length": 5, "hash_ids": [1]}
    path.write_text("\n".join(json.dumps(row | {"timestamp": int(first) + i}) for i in range(9)))
    with pytest.raises(WorkloadError, match=rf"a\.jsonl, line 1: .* looks like {unit} since 1970"):
        read_trace(path)
    assert read_trace(path, time_unit=unit).time_unit == unit


@pytest.mark.parametrize("first", [0.0, 1.7e9])
def test_seconds_by_name_may_count_from_anywhere_but_are_no_milliseconds(tmp_path, first):
    path = tmp_path / "a.csv"
    header = "arrival_s,prompt_tokens,output_tokens\n"
    path.write_text(header + "".join(f"{first + i},5,5\n" for i in range(9)))
    assert read_trace(path).table.rate_rps == 1.0
    path.write_text(header + "".join(f"{1000 * (1.7e9 + i)},5,5\n" for i in range(9)))
    with pytest.raises(WorkloadError, match=r"line 2: arrival_s 1700000000000 looks like ms"):
        read_trace(path)


def test_the_headline_tells_the_recorded_rate(tmp_path):
    path = tmp_path / "a.csv"
    header = "arrival_s,prompt_tokens,output_tokens\n"
    path.write_text(header + "".join(f"{i / 4},5,5\n" for i in range(9)))
    assert read_trace(path).headline() == "a.csv: 9 requests over 2 s, 4/s, as recorded"
    path.write_text(header + "3,5,5\n" * 2)
    assert read_trace(path).headline() == "a.csv: 2 requests at one time, as recorded"
