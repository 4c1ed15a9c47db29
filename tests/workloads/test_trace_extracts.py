"""Published traces are read as a few lines of plain Python read them."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workloads.fit import fit_quality, fit_workload
from servegym.workloads.readers import read_trace

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "traces"

pytestmark = pytest.mark.skipif(not TRACES.is_dir(), reason="the trace extracts are not here")


def plain_csv(name):
    with gzip.open(TRACES / name, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(
        [float(row[c]) for row in rows] for c in ("arrival_s", "input_tokens", "output_tokens")
    )


def plain_parquet(name, *columns):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(TRACES / name)
    return tuple(table.column(c).to_pylist() for c in columns)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("azure2023_conv_first30min.csv.gz", 10108),
        ("azure2023_code_first30min.csv.gz", 5740),
        ("mooncake_conversation_firsthalf.parquet", 5606),
        ("mooncake_synthetic_firsthalf.parquet", 1925),
    ],
)
def test_an_extract_keeps_rows_tokens_and_times(name, rows):
    if name.endswith("gz"):
        arrival, prompt, output = plain_csv(name)
    else:
        arrival, prompt, output = plain_parquet(name, "arrival_s", "input_tokens", "output_tokens")
    table = read_trace(TRACES / name).table
    assert len(table) == rows == len(arrival)
    assert int(table.prompt_tokens.sum(dtype=np.int64)) == sum(prompt)
    assert int(table.output_tokens.sum(dtype=np.int64)) == sum(output)
    assert table.arrival_s[0] == 0.0
    assert table.arrival_s[-1] == max(arrival) - min(arrival)
    first = arrival.index(min(arrival))
    assert (table.prompt_tokens[0], table.output_tokens[0]) == (prompt[first], output[first])


@pytest.mark.parametrize(
    "name", ["mooncake_conversation_firsthalf.parquet", "mooncake_synthetic_firsthalf.parquet"]
)
def test_prefix_keys_give_the_hits_of_an_endless_cache(name):
    # the extract says how many leading blocks an endless cache would have held
    (ideal,) = plain_parquet(name, "ideal_prefix_hit_blocks")
    table = read_trace(TRACES / name).table
    seen: set[int] = set()
    hits = []
    for first, last in zip(table.prefix_offsets[:-1], table.prefix_offsets[1:], strict=True):
        keys = table.prefix_keys[first:last].tolist()
        known = [key in seen for key in keys]
        hits.append(known.index(False) if False in known else len(known))
        seen.update(keys)
    assert hits == ideal


@pytest.mark.parametrize(
    "name",
    [
        "sharegpt_val10k_lengths_first5k.csv.gz",
        "apex_traces_llama.csv.gz",
        "servegen_client_rates_first2days.parquet",
    ],
)
def test_a_file_that_is_no_request_stream_is_refused_by_column(name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(WorkloadError, match=f"{name} has no column for arrival_s"):
        read_trace(TRACES / name)


def test_the_fit_of_the_conversation_trace_is_as_close_as_documented():
    # the scenario azure-conv-fit documents 0.021 (gaps), 0.150 (prompts) and 0.064 (outputs)
    table = read_trace(TRACES / "azure2023_conv_first30min.csv.gz").table
    distance = {row.quantity: row.kolmogorov for row in fit_quality(table, fit_workload(table))}
    assert distance["gap_s"] == pytest.approx(0.021, abs=0.01)
    assert distance["prompt_tokens"] == pytest.approx(0.150, abs=0.01)
    assert distance["output_tokens"] == pytest.approx(0.064, abs=0.01)


def test_recorded_sessions_keep_their_calls_gaps_and_shared_beginnings():
    parquet = pytest.importorskip("pyarrow.parquet")
    name = "weka_agentic_sessions_firsthalf.parquet"
    rows = [r for r in parquet.read_table(TRACES / name).to_pylist() if not r["duplicate_session"]]
    trace = read_trace(TRACES / name)
    pool = trace.sessions
    assert len(pool) == len({row["session"] for row in rows}) == 355
    main = {}
    for row in rows:
        if row["agent"] == "main" and row["kind"] != "subagent":
            main.setdefault(row["session"], []).append(row)
    # sessions without sub-agents are one chain: prompts, answers and gaps as they are in the file
    plain = [s for s in main if all(r["agent"] == "main" for r in rows if r["session"] == s)]
    assert len(plain) > 300
    at = {session: k for k, session in enumerate(main)}
    for session in plain[::10]:
        mine = slice(pool.first[at[session]], pool.first[at[session] + 1])
        recorded = main[session]
        assert pool.prompt_tokens[mine].tolist() == [r["input_tokens"] for r in recorded]
        assert pool.output_tokens[mine].tolist() == [max(1, r["output_tokens"]) for r in recorded]
        gaps = [r["think_time_s"] or 0.0 for r in recorded[1:]]
        np.testing.assert_allclose(pool.delay_s[mine][1:], gaps)
