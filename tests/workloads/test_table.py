"""The request table refuses what is no stream, and cuts and scales what is one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servegym.errors import WorkloadError
from servegym.workloads.table import RequestTable


def table(arrival=(0.0, 1.0, 3.0, 6.0), **columns):
    n = len(arrival)
    return RequestTable.build(
        np.array(arrival, np.float64), np.arange(1, n + 1), np.arange(1, n + 1) * 10, **columns
    )


# request i has i segments, with keys 10 i, 10 i + 1, ...
OFFSETS = np.array([0, 0, 1, 3, 6])
KEYS = np.array([10, 20, 21, 30, 31, 32])
ENDS = np.array([8, 8, 16, 8, 16, 24], np.int32)
PREFIXED = table(prefix_offsets=OFFSETS, prefix_keys=KEYS, prefix_ends=ENDS)


def segments(t, i):
    part = slice(t.prefix_offsets[i], t.prefix_offsets[i + 1])
    return list(zip(t.prefix_keys[part].tolist(), t.prefix_ends[part].tolist(), strict=True))


def test_columns_left_out_get_neutral_values():
    t = table()
    assert t.slo_class.tolist() == [0] * 4
    assert t.tenant.tolist() == [0] * 4
    assert t.session.tolist() == [-1] * 4
    assert t.after.tolist() == [-1] * 4  # everybody comes by themselves
    assert t.delay_s.tolist() == [0.0] * 4
    assert t.predicted_output_tokens.tolist() == [25.0] * 4  # the mean of 10, 20, 30, 40
    assert t.prefix_offsets.tolist() == [0] * 5


def test_columns_have_their_types():
    types = {name: str(getattr(PREFIXED, name).dtype) for name in PREFIXED.__dataclass_fields__}
    assert types == {
        "arrival_s": "float64",
        "prompt_tokens": "int32",
        "output_tokens": "int32",
        "predicted_output_tokens": "float64",
        "slo_class": "int16",
        "tenant": "int32",
        "session": "int32",
        "prefix_offsets": "int64",
        "prefix_keys": "int64",
        "prefix_ends": "int32",
        "after": "int32",
        "delay_s": "float64",
        "tool": "int16",
    }


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("arrival_s", [0.0, 2.0, 1.0, 6.0], "ascending"),
        ("arrival_s", [0.0, 1.0, np.nan, 6.0], "finite"),
        ("arrival_s", [-1.0, 1.0, 2.0, 6.0], r"negative, got -1\.0"),
        ("prompt_tokens", [1, 0, 3, 4], "prompt_tokens must be at least 1, got 0 in request 1"),
        ("output_tokens", [1, 2, 3, -4], "output_tokens must be at least 1, got -4 in request 3"),
        ("predicted_output_tokens", [1.0, 0.5, 1.0, 1.0], r"got 0\.5 in request 1"),
        ("tenant", [1, 2], "tenant has 2 rows, not 4"),
        ("prefix_offsets", [0, 0], "prefix segments"),
        ("prefix_keys", [1], "prefix segments"),
    ],
)
def test_a_wrong_column_is_refused_by_name(column, values, message):
    with pytest.raises(WorkloadError, match=message):
        replace(table(), **{column: np.array(values)})


def test_an_empty_table_is_refused():
    with pytest.raises(WorkloadError, match="at least one request"):
        table(arrival=())


def test_take_keeps_times_and_segments():
    part = PREFIXED.take(np.array([1, 3]))
    assert part.arrival_s.tolist() == [1.0, 6.0]
    assert part.prompt_tokens.tolist() == [2, 4]
    assert segments(part, 0) == [(10, 8)]
    assert segments(part, 1) == [(30, 8), (31, 16), (32, 24)]


@given(st.sets(st.integers(0, 3), min_size=1))
def test_take_gives_every_request_its_own_segments(rows):
    chosen = np.array(sorted(rows))
    part = PREFIXED.take(chosen)
    for new, old in enumerate(chosen):
        assert segments(part, new) == segments(PREFIXED, old)


def test_a_window_is_half_open_and_starts_at_0():
    part = PREFIXED.window(1.0, 5.0)  # 1 and 3 s; 6 s is outside
    assert part.arrival_s.tolist() == [0.0, 2.0]
    assert segments(part, 1) == [(20, 8), (21, 16)]


def test_an_empty_window_is_refused_with_the_span():
    with pytest.raises(WorkloadError, match=r"between 7 s and 9 s.*from 0 s to 6 s"):
        PREFIXED.window(7.0, 2.0)


def test_a_request_without_session_is_a_conversation_of_its_own():
    t = table(session=np.array([7, -1, 7, -1]))
    assert t.conversation[0] == t.conversation[2]
    assert sorted(set(t.conversation.tolist())) == [0, 1, 2]
    assert table().conversation.tolist() == [0, 1, 2, 3]


def test_scaling_keeps_the_shape():
    fast = PREFIXED.scaled(2.0)
    assert fast.arrival_s.tolist() == [0.0, 0.5, 1.5, 3.0]
    assert fast.rate_rps == pytest.approx(2 * PREFIXED.rate_rps)
    assert fast.prompt_tokens.tolist() == PREFIXED.prompt_tokens.tolist()
    assert segments(fast, 3) == segments(PREFIXED, 3)


@pytest.mark.parametrize("factor", [0.0, -1.0, np.nan, np.inf])
def test_an_impossible_scale_is_refused(factor):
    with pytest.raises(WorkloadError, match="rate_factor must be above 0"):
        PREFIXED.scaled(factor)


def test_the_rate_counts_gaps():
    assert PREFIXED.rate_rps == 0.5  # 3 gaps in 6 s
