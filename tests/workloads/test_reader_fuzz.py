"""Whatever a trace file holds, it is read or refused in one sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.errors import WorkloadError
from servegym.workloads.readers import read_trace

CSV = "arrival_s,prompt_tokens,output_tokens,slo_class,prefix_hashes\n0,600,5,1,7 8\n1,5,5,,\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,48,10\n"
WAITING = (
    "id,arrival_s,prompt_tokens,output_tokens,after,delay_s\na,0,6,5,,\nb,,5,5,a,2\nc,9,5,5,b,1\n"
)
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
BAILIAN = (
    '{"chat_id": 3, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 20,'
    ' "output_length": 5, "turn": 1, "hash_ids": [1, 2]}\n'
)
#: What goes wrong in files: separators, quotes, marks, line ends, numbers of other kinds.
PIECES = [*",;\"'\n\r\t\0 .-_:{}[]0", "\ufeff", "\u2028", "nan", "1e999", "null", "true", "-1", "é"]

edits = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), st.sampled_from(PIECES)))
cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-9, 2**65), max_size=3),
)


def read_or_refuse(path, **options):
    said, table = "", None
    try:
        table = read_trace(path, **options).table
    except WorkloadError as error:
        said = str(error)
    if table is None:
        assert path.name in said or "chat" in said
    else:
        assert (table.prompt_tokens >= 1).all()
        assert table.arrival_s[0] == 0.0


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", CSV),
        ("a.csv", AZURE),
        ("a.csv", WAITING),
        ("a.jsonl", MOONCAKE * 2),
        ("a.jsonl", BAILIAN),
    ],
)
@given(edits=edits)
@settings(max_examples=150)
def test_edited_texts_are_read_or_refused(tmp_path_factory, name, text, on_bad_row, edits):
    for place, cut, piece in edits:
        place %= len(text) + 1
        text = text[:place] + piece + text[place + cut :]
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(text.encode())
    read_or_refuse(path, on_bad_row=on_bad_row)


@pytest.mark.parametrize("row", [MOONCAKE, BAILIAN])
@given(key=st.integers(0, 9), value=cells, unit=st.sampled_from([None, "s", "ns"]))
@settings(max_examples=200)
def test_any_value_in_any_cell_is_read_or_refused(tmp_path_factory, row, key, value, unit):
    record = json.loads(row)
    record[list(record)[key % len(record)]] = value
    path = tmp_path_factory.getbasetemp() / "b.jsonl"
    path.write_text(row + json.dumps(record) + "\n")
    read_or_refuse(path, time_unit=unit)
