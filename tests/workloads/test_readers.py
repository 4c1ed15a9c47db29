"""Every trace format is read to the same table, and every bad row is named."""

from __future__ import annotations

import gzip
import json
import time

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.readers import read_trace

NATIVE = "arrival_s,prompt_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def mooncake(timestamp=0, prompt=600, output=5, hash_ids=None):
    """A row with a hash for every 512 tokens of its prompt, unless others are given."""
    if hash_ids is None:
        hash_ids = range(max(1, -(-(prompt or 1) // 512)))
    return json.dumps(
        {
            "timestamp": timestamp,
            "input_length": prompt,
            "output_length": output,
            "hash_ids": list(hash_ids),
        }
    )


@pytest.fixture
def write(tmp_path):
    def _write(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


@pytest.fixture
def in_new_york(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


# Every stream below is the same: 4808 + 3180 tokens in, 10 + 8 out, 1.25 s apart.
SAME_STREAM = {
    "azure_2023.csv": AZURE + "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:05.2299600,3180,8\n",
    "azure_2024.csv": AZURE + "2024-05-10 00:00:00.009930+00:00,4808,10\n"
    "2024-05-10 00:00:01.259930+00:00,3180,8\n",
    "burstgpt.csv": BURST + "5,ChatGPT,4808,10,4818,Conversation log\n"
    "6.25,GPT-4,3180,8,3188,API log\n",
    "native.csv": NATIVE + "100.0,4808,10\n101.25,3180,8\n",
    "short_names.csv": "arrival_s,input_tokens,output_tokens\n0,4808,10\n1.25,3180,8\n",
    "mooncake.jsonl": f"{mooncake(27000, 4808, 10)}\n{mooncake(28250, 3180, 8)}\n",
}


def assert_the_same_stream(trace):
    assert trace.table.arrival_s.tolist() == pytest.approx([0.0, 1.25], abs=1e-6)
    assert trace.table.prompt_tokens.tolist() == [4808, 3180]
    assert trace.table.output_tokens.tolist() == [10, 8]
    assert trace.num_skipped == 0


@pytest.mark.parametrize("name", SAME_STREAM)
def test_a_stream_is_the_same_in_every_format(write, name):
    trace = read_trace(write(name, SAME_STREAM[name]))
    assert_the_same_stream(trace)
    assert trace.name == name


@pytest.mark.parametrize("name", ["native.csv", "mooncake.jsonl"])
def test_a_gzipped_file_reads_as_the_plain_one(write, name):
    packed = gzip.compress(SAME_STREAM[name].encode())
    assert_the_same_stream(read_trace(write(f"{name}.gz", packed)))


@pytest.mark.parametrize("name", ["native.csv", "mooncake.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(write, name):
    assert_the_same_stream(read_trace(write(name, "\ufeff" + SAME_STREAM[name])))


def test_parquet_reads_as_csv_does(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"arrival_s": [7.0, 8.25], "prompt_tokens": [4808, 3180], "output_tokens": [10, 8]}
    parquet.write_table(pa.table(columns), tmp_path / "native.parquet")
    assert_the_same_stream(read_trace(str(tmp_path / "native.parquet")))


def test_arrivals_out_of_order_are_sorted_with_their_requests(write):
    trace = read_trace(write("a.csv", NATIVE + "5,50,5\n3,30,3\n5,51,5\n"))
    assert trace.table.arrival_s.tolist() == [0.0, 2.0, 2.0]
    assert trace.table.prompt_tokens.tolist() == [30, 50, 51]  # equal times keep their order


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="the time zone cannot be set here")
@pytest.mark.usefixtures("in_new_york")
@pytest.mark.parametrize(
    ("first", "second", "gap_s"),
    [
        # the clocks of New York go back at 02:00 of that night; the trace's do not
        ("2023-11-05 01:30:00.0000000", "2023-11-05 03:30:00.0000000", 7200.0),
        # a whole second is printed without a fraction
        ("2024-05-10 00:00:00.500000+00:00", "2024-05-10 00:00:01+00:00", 0.5),
    ],
)
def test_gaps_do_not_depend_on_the_time_zone_of_the_machine(write, first, second, gap_s):
    path = write("azure.csv", f"{AZURE}{first},1,1\n{second},2,2\n")
    table = read_trace(path).table
    assert table.arrival_s[-1] == pytest.approx(gap_s, abs=1e-5)
    assert table.prompt_tokens.tolist() == [1, 2]


def test_optional_columns_are_kept(write):
    text = "arrival_s,prompt_tokens,output_tokens,slo_class,tenant,session\n0,5,5,1,7,0\n1,5,5,,,\n"
    table = read_trace(write("a.csv", text)).table
    assert table.slo_class.tolist() == [1, 0]
    assert table.tenant.tolist() == [7, 0]
    assert table.session.tolist() == [0, -1]


def test_session_0_is_a_session_in_jsonl_too(write):
    record = {"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 5, "session": 0}
    table = read_trace(write("a.jsonl", json.dumps(record))).table
    assert table.session.tolist() == [0]


# ---- prefixes ----


def keys_of(table, i):
    return table.prefix_keys[table.prefix_offsets[i] : table.prefix_offsets[i + 1]].tolist()


def test_equal_leading_hashes_give_equal_keys(write):
    lines = [
        mooncake(0, 1500, 5, (1, 2, 3)),
        mooncake(1, 1500, 5, (1, 2, 4)),
        mooncake(2, 1000, 5, (9, 2)),  # the same block after another beginning: another text
        mooncake(3, 100, 5, (9,)),
    ]
    table = read_trace(write("a.jsonl", "\n".join(lines))).table
    a, b, c, d = (keys_of(table, i) for i in range(4))
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert not set(a) & set(c)
    assert d == c[:1]
    assert table.prefix_ends[:3].tolist() == [512, 1024, 1536]  # a hash covers 512 tokens


def test_hashes_that_differ_give_keys_that_differ(write):
    # Python's hash((k, -1)) is hash((k, -2)); 64 bits must tell apart sign, order and depth
    hashes = [-1, -2, 0, 1, 2**62, 2**63, 2**64 - 3, *range(100, 300)]
    lines = [mooncake(i, 1500, 5, (h, g, h)) for i, h in enumerate(hashes) for g in (-1, -2)]
    table = read_trace(write("a.jsonl", "\n".join(lines))).table
    # two requests a hash share its first key and part at the second
    assert len(set(table.prefix_keys.tolist())) == 5 * len(hashes)
    assert table.prefix_keys.min() >= 0


def test_native_prefix_hashes_are_read_from_one_cell(write):
    text = "arrival_s,prompt_tokens,output_tokens,prefix_hashes\n0,600,5,1 2\n1,600,5,1 3\n"
    table = read_trace(write("a.csv", text)).table
    a, b = keys_of(table, 0), keys_of(table, 1)
    assert a[0] == b[0]
    assert a[1] != b[1]


# ---- malformed rows ----

GOOD = "0,10,10\n"
GOOD_JSON = mooncake() + "\n"
CLASSED = "arrival_s,prompt_tokens,output_tokens,slo_class\n0,1,1,0\n"
HASHED = "arrival_s,prompt_tokens,output_tokens,prefix_hashes\n0,1,1,1\n"
BAD_ROWS = {
    "csv word": ("a.csv", NATIVE + GOOD + "1,ten,10\n", 3, "prompt_tokens"),
    "csv negative": ("a.csv", NATIVE + GOOD + "1,-10,10\n", 3, "prompt_tokens"),
    "csv zero output": ("a.csv", NATIVE + GOOD + "1,10,0\n", 3, "output_tokens"),
    "csv fraction": ("a.csv", NATIVE + GOOD + "1,10.5,10\n", 3, "prompt_tokens"),
    "csv empty cell": ("a.csv", NATIVE + GOOD + "1,,10\n", 3, "prompt_tokens"),
    "csv short row": ("a.csv", NATIVE + GOOD + "1,10\n", 3, "2 fields, but the header has 3"),
    "csv long row": ("a.csv", NATIVE + GOOD + "1,1,234,10\n", 3, "4 fields, but the header has 3"),
    "csv thousands": ("a.csv", NATIVE + GOOD + '1,"1,234",10\n', 3, "prompt_tokens"),
    "csv thousands with points": ("a.csv", NATIVE + GOOD + "1,2.000,10\n", 3, "may mean thousands"),
    "csv thousands with blanks": ("a.csv", NATIVE + GOOD + "1,2 000,10\n", 3, "prompt_tokens"),
    "csv underscores": ("a.csv", NATIVE + GOOD + "1,1_234,10\n", 3, "prompt_tokens"),
    "csv other digits": ("a.csv", NATIVE + GOOD + "1,\u0663,10\n", 3, "prompt_tokens"),
    "csv decimal comma": ("a.csv", NATIVE + GOOD + '"1,5",10,10\n', 3, "arrival_s"),
    "csv mark amid": ("a.csv", NATIVE + GOOD + "\ufeff1,10,10\n", 3, "arrival_s"),
    "csv time is infinite": ("a.csv", NATIVE + GOOD + "-inf,10,10\n", 3, "arrival_s"),
    "csv infinite tokens": ("a.csv", NATIVE + GOOD + "1,inf,10\n", 3, "prompt_tokens"),
    "csv more than int32": ("a.csv", NATIVE + GOOD + "1,3000000000,10\n", 3, "prompt_tokens"),
    "csv time is a word": ("a.csv", NATIVE + GOOD + "noon,10,10\n", 3, "arrival_s"),
    "csv time is nan": ("a.csv", NATIVE + GOOD + "nan,10,10\n", 3, "arrival_s"),
    "csv blank line before": ("a.csv", NATIVE + GOOD + "\n1,ten,10\n", 4, "prompt_tokens"),
    "csv class is a word": ("a.csv", CLASSED + "1,1,1,gold\n", 3, "slo_class"),
    "csv negative class": ("a.csv", CLASSED + "1,1,1,-1\n", 3, "slo_class"),
    "csv hash is a word": ("a.csv", HASHED + "1,1,1,a b\n", 3, "prefix_hashes"),
    "azure time": ("a.csv", AZURE + "16/11/2023,10,10\n", 2, "TIMESTAMP"),
    "azure day alone": ("a.csv", AZURE + "20231116,10,10\n", 2, "TIMESTAMP"),
    "azure tokens": ("a.csv", AZURE + "2023-11-16 18:15:46.6,10,x\n", 2, "GeneratedTokens"),
    "burstgpt failed": ("a.csv", BURST + "5,GPT-4,10,0,10,API log\n", 2, "Response tokens"),
    "mooncake null": ("a.jsonl", GOOD_JSON + mooncake(prompt=None), 2, "input_length"),
    "mooncake negative": ("a.jsonl", GOOD_JSON + mooncake(prompt=-1), 2, "input_length"),
    "mooncake zero": ("a.jsonl", GOOD_JSON + mooncake(output=0), 2, "output_length"),
    "mooncake infinite": ("a.jsonl", GOOD_JSON + mooncake(output=np.inf), 2, "output_length"),
    "mooncake true": ("a.jsonl", GOOD_JSON + mooncake(output=True), 2, "output_length"),
    "mooncake huge": ("a.jsonl", GOOD_JSON + mooncake(output=10**400), 2, "output_length"),
    "mooncake time is nan": ("a.jsonl", GOOD_JSON + mooncake(timestamp=np.nan), 2, "timestamp"),
    "mooncake key twice": (
        "a.jsonl",
        GOOD_JSON + '{"timestamp": 1, "input_length": 9, "input_length": 90, "output_length": 1}',
        2,
        "the key 'input_length' is given twice",
    ),
    "mooncake time": ("a.jsonl", GOOD_JSON + mooncake(timestamp="noon"), 2, "timestamp"),
    "mooncake hash": ("a.jsonl", GOOD_JSON + mooncake(hash_ids=["a"]), 2, "hash_ids"),
    "mooncake hash fraction": ("a.jsonl", GOOD_JSON + mooncake(hash_ids=[1.5]), 2, "hash_ids"),
    "mooncake hash too long": ("a.jsonl", GOOD_JSON + mooncake(hash_ids=[2**64]), 2, "hash_ids"),
    "mooncake hash list": (
        "a.jsonl",
        GOOD_JSON + '{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": 7}',
        2,
        "hash_ids",
    ),
    "mooncake lacks output": (
        "a.jsonl",
        GOOD_JSON + '{"timestamp": 1, "input_length": 1}',
        2,
        "output_length",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_refused_with_file_line_and_column(write, case):
    name, text, line, column = BAD_ROWS[case]
    with pytest.raises(WorkloadError) as caught:
        read_trace(write(name, text))
    assert f"{name}, line {line}" in str(caught.value)
    assert column in str(caught.value)


@pytest.mark.parametrize("case", [c for c in BAD_ROWS if BAD_ROWS[c][2] == 3])
def test_a_bad_row_is_skipped_and_counted_on_request(write, case):
    name, text, line, _ = BAD_ROWS[case]
    trace = read_trace(write(name, text), on_bad_row="skip")
    assert len(trace.table) == 1
    assert trace.num_skipped == 1
    assert f"line {line}" in trace.first_bad


def test_broken_json_is_refused_with_its_line(write):
    with pytest.raises(WorkloadError, match=r"a\.jsonl, line 2: not JSON"):
        read_trace(write("a.jsonl", GOOD_JSON + '{"timestamp": 1,\n'))


def test_broken_json_is_skipped_and_counted_on_request(write):
    text = GOOD_JSON + '{"timestamp": 1,\n' + mooncake(5)
    trace = read_trace(write("a.jsonl", text), on_bad_row="skip")
    assert (len(trace.table), trace.num_skipped) == (2, 1)
    assert "line 2" in trace.first_bad


def test_a_json_line_that_is_no_object_is_refused_with_its_line(write):
    with pytest.raises(WorkloadError, match="line 2"):
        read_trace(write("a.jsonl", GOOD_JSON + "[1, 2, 3]\n"))


@pytest.mark.parametrize("case", [c for c in BAD_ROWS if c.startswith("mooncake")])
def test_a_bad_json_row_is_skipped_and_counted_on_request(write, case):
    name, text, line, column = BAD_ROWS[case]
    trace = read_trace(write(name, text), on_bad_row="skip")
    assert (len(trace.table), trace.num_skipped) == (1, 1)
    assert f"line {line}" in trace.first_bad
    assert column in trace.first_bad


def test_skipping_reports_the_first_of_several(write):
    text = NATIVE + "0,1,1\n1,x,1\n2,1,1\n3,1,0\n"
    trace = read_trace(write("a.csv", text), on_bad_row="skip")
    assert (len(trace.table), trace.num_skipped) == (2, 2)
    assert "line 3, column prompt_tokens" in trace.first_bad


def test_a_bad_parquet_row_is_refused_with_its_place(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"arrival_s": [0.0, 1.0], "prompt_tokens": [5, None], "output_tokens": [5, 5]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(WorkloadError, match=r"a\.parquet, line 2, column prompt_tokens"):
        read_trace(tmp_path / "a.parquet")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["native.csv", "mooncake.jsonl", "azure_2023.csv"])
def test_line_ends_of_all_systems_are_read_also_mixed(write, name, end):
    first, rest = SAME_STREAM[name].split("\n", 1)
    assert_the_same_stream(read_trace(write(name, first + end + rest)))
    assert_the_same_stream(read_trace(write(name, SAME_STREAM[name].replace("\n", end))))


@pytest.mark.parametrize("text", ["arrival_s, prompt_tokens , output_tokens\n", NATIVE + "\n  \n"])
def test_blanks_around_names_and_empty_lines_do_not_count(write, text):
    assert_the_same_stream(read_trace(write("a.csv", text + "100.0,4808,10\n101.25,3180,8\n\n")))


def test_a_column_named_twice_is_refused_by_file(write, tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,10,10,1000\n"
    with pytest.raises(WorkloadError, match=r"a\.csv has 2 columns 'prompt_tokens'"):
        read_trace(write("a.csv", text))
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ["arrival_s", "prompt_tokens", "output_tokens", "prompt_tokens"]
    table = pa.table([[0.0], [10], [10], [1000]], names=names)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(WorkloadError, match=r"a\.parquet has 2 columns 'prompt_tokens'"):
        read_trace(tmp_path / "a.parquet")


def test_an_open_quote_does_not_swallow_the_rest_of_the_file(write):
    with pytest.raises(WorkloadError, match=r"a\.csv, line \d: no CSV"):
        read_trace(write("a.csv", NATIVE + '0,10,10\n1,"10,10\n2,10,10\n'))


def test_a_null_in_an_optional_parquet_column_is_none(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"arrival_s": [0.0, 1.0], "prompt_tokens": [5, 5], "output_tokens": [5, 5]}
    columns |= {"session": [3, None], "slo_class": [0, None], "hash_ids": [[1], None]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    trace = read_trace(tmp_path / "a.parquet")
    assert trace.table.session.tolist() == [3, -1]
    assert trace.class_given.tolist() == [True, False]
    assert trace.table.prefix_offsets.tolist() == [0, 1, 1]


# ---- unusable files ----


@pytest.mark.parametrize(
    ("text", "want", "got"),
    [
        ("prompt_tokens,output_tokens\n1,1\n", "arrival_s", "prompt_tokens, output_tokens"),
        ("TIMESTAMP,GeneratedTokens\n2023-11-16 18:15:46,1\n", "ContextTokens", "GeneratedTokens"),
        ("arrival_s,prompt_tokens\n0,1\n", "output_tokens", "arrival_s, prompt_tokens"),
    ],
)
def test_a_missing_column_is_named_beside_those_there(write, text, want, got):
    with pytest.raises(WorkloadError) as caught:
        read_trace(write("a.csv", text))
    assert want in str(caught.value)
    assert got in str(caught.value)


UNREADABLE = {
    "empty.csv": b"",
    "empty.jsonl": b"",
    "header_only.csv": NATIVE.encode(),
    "garbage.csv.gz": b"this is no gzip file",
    "cut.csv.gz": gzip.compress((NATIVE + GOOD).encode())[:-9],
    "corrupt.csv.gz": gzip.compress((NATIVE + GOOD).encode())[:12] + b"\xff" * 40,
    "endless_cell.csv": (NATIVE + "1" * 200_000).encode(),
    "garbage.parquet": b"this is no parquet file",
    "not_text.csv": b"\xff\xfe\x00\x81",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_file_is_refused_by_name(write, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(WorkloadError, match=name):
        read_trace(write(name, UNREADABLE[name]))


def test_a_missing_file_is_refused_by_path(tmp_path):
    with pytest.raises(WorkloadError, match=r"nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv")


@pytest.mark.parametrize("name", ["trace.txt", "trace.xlsx", "trace.json", "trace"])
def test_an_unknown_extension_is_refused_with_the_known_ones(write, name):
    with pytest.raises(WorkloadError) as caught:
        read_trace(write(name, NATIVE + GOOD))
    for known in (name, "csv", "jsonl", "parquet"):
        assert known in str(caught.value)
