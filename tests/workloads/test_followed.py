"""Rows of a log that name what they followed, as columns of a table."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.config import TraceConfig
from servegym.workloads.followed import Followed, link_followed, parse_followed
from servegym.workloads.readers import read_trace

NAN = float("nan")


def linked(*rows):
    """Rows are key, arrival, end, followed."""
    keys, arrival_s, end_s, followed = zip(*rows, strict=True)
    return link_followed(keys, np.array(arrival_s), np.array(end_s), followed)


def test_a_row_waits_for_the_one_it_names():
    found = linked(
        ("a", 0.0, 2.0, None),
        ("b", 1.0, 4.0, None),
        ("c", 5.0, 6.0, Followed("a", 3.0, "session")),
        ("d", 6.5, 7.0, Followed("c", 0.5, "prefix")),
    )
    assert found.after.tolist() == [-1, -1, 0, 2]
    assert found.delay_s.tolist() == [0.0, 0.0, 3.0, 0.5]
    assert found.num_by == {"session": 1, "prefix": 1}
    assert (found.num_waiting, found.num_cut) == (2, 0)


def test_of_rows_with_one_name_that_counts_which_ended_then():
    found = linked(
        ("a", 0.0, 10.0, None),
        ("a", 20.0, 30.0, None),
        ("a", 40.0, 50.0, None),
        ("b", 60.0, 61.0, Followed("a", 30.004, "session")),  # its end is read a little later
    )
    assert found.after.tolist() == [-1, -1, -1, 1]


def test_many_rows_with_one_name_are_linked_in_time_linear_in_their_number():
    num = 100_000
    arrival_s = np.arange(num) * 2.0
    followed = [None, *[Followed("a", 1.0, "session")] * (num - 1)]
    begin_s = time.process_time()
    found = link_followed(["a"] * num, arrival_s, arrival_s + 1.0, followed)
    assert time.process_time() - begin_s < 10.0  # 0.5 s; each with each would be an hour
    assert found.after.tolist() == list(range(-1, num - 1))


@pytest.mark.parametrize(
    "other",
    [
        ("x", 0.0, 2.0, None),  # another name
        ("a", 0.0, NAN, None),  # not answered
        ("a", 0.0, 4.5, None),  # answered at another time
    ],
)
def test_what_is_not_there_is_counted_and_its_delay_kept(other):
    found = linked(other, ("b", 5.0, 6.0, Followed("a", 3.0, "session")))
    assert found.after.tolist() == [-1, -1]
    assert found.delay_s.tolist() == [0.0, 3.0]
    assert (found.num_waiting, found.num_cut) == (0, 1)
    assert found.sentence.endswith("; 1 follow one that is not in it, and come by themselves")


def test_a_clock_that_was_set_back_makes_no_request_wait_for_a_later_one():
    found = linked(
        ("b", 5.0, 6.0, Followed("a", 3.0, "session")),
        ("a", 5.5, 7.0, None),
    )
    assert found.after.tolist() == [-1, -1]
    assert found.num_cut == 1


@pytest.mark.parametrize(
    "value",
    [
        "a",
        {"key": 1, "delay_s": 0.0, "by": "session"},
        {"key": "a", "delay_s": -1.0, "by": "session"},
        {"key": "a", "delay_s": True, "by": "session"},
        {"key": "a", "delay_s": NAN, "by": "session"},
        {"key": "a", "delay_s": 10**400, "by": "session"},
        {"key": "a", "delay_s": 1.0, "by": ["session"]},
        {"key": "a", "delay_s": 1.0, "by": "chance"},
        {"key": "a", "delay_s": 1.0},
    ],
)
def test_a_malformed_entry_is_named(value):
    with pytest.raises(WorkloadError, match=r"line 3, column follows: .* one of session, prefix"):
        parse_followed("line 3", value)


def row(key, arrival_s, e2e_s, followed=None, status="finished"):
    follows = None if followed is None else dict(zip(("key", "delay_s"), followed, strict=True))
    return {
        "key": key,
        "arrival_s": 1.7e9 + arrival_s,
        "prompt_tokens": 10,
        "output_tokens": 5,
        "status": status,
        "e2e_s": e2e_s,
        "follows": follows and {**follows, "by": "session"},
        "decisions": [],
    }


@pytest.fixture
def log(tmp_path):
    """One session of 20 turns, each a second long and answered 2 s before the next."""
    rows = [row(str(i), 3.0 * i, 1.0, (str(i - 1), 2.0) if i else None) for i in range(20)]
    path = tmp_path / "requests-1.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_routers_log_is_a_closed_loop(log):
    trace = read_trace(log)
    assert trace.table.after.tolist() == list(range(-1, 19))
    assert trace.table.delay_s.tolist() == [0.0, *[2.0] * 19]
    assert trace.remarks() == [
        "requests-1.jsonl: 19 of 20 requests wait for an answer: 19 by their session, 0 as guessed"
        " from their prompts"
    ]
    counts = trace.counts()
    assert counts["waiting_requests"] == 19
    assert counts["guessed_waiting_requests"] == 0
    assert counts["requests_without_predecessor"] == 0


def test_it_is_open_where_that_is_asked_for(log):
    table = TraceConfig(path=str(log), wait_for_answers=False).whole()
    assert table.num_waiting == 0
    np.testing.assert_allclose(table.arrival_s, 3.0 * np.arange(20))


def test_a_log_that_does_not_say_stays_open(tmp_path):
    rows = [row("a", 0.0, 1.0), row("b", 3.0, 1.0)]
    del rows[0]["follows"]
    path = tmp_path / "old.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    trace = read_trace(path)
    assert trace.links is None
    assert trace.table.num_waiting == 0
    assert trace.remarks() == []


def test_a_failed_request_is_no_end(tmp_path):
    rows = [row("a", 0.0, 1.0, status="failed"), row("b", 3.0, 1.0, ("a", 2.0))]
    path = tmp_path / "failed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = read_trace(path).table
    assert table.num_waiting == 0


def test_a_window_cuts_its_first_request_off(log):
    table = TraceConfig(path=str(log)).table(np.random.default_rng(1), num_requests=5)
    assert table.after.tolist() == [-1, 0, 1, 2, 3]
    assert table.num_waiting == 4
    np.testing.assert_allclose(table.arrival_s, 3.0 * np.arange(5))
