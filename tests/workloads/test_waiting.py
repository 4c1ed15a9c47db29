"""Rows of a trace that wait for others: whom they mean, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import NEVER, Asks
from servegym.errors import WorkloadError
from servegym.evaluate.repeats import plan
from servegym.problems.registry import problem_of
from servegym.scenario import parse_scenario
from servegym.traced_scenario import with_trace
from servegym.workloads.config import TraceConfig
from servegym.workloads.readers import read_trace
from servegym.workloads.table import RequestTable

WITH_ID = "id,arrival_s,prompt_tokens,output_tokens,after,delay_s\n"
WITHOUT = WITH_ID.removeprefix("id,")
FLEET = "{name: tiny, fleet: [{gpu: L40S}], workload: {kind: generated, rate_rps: 1.0}}"


@pytest.fixture
def write(tmp_path):
    def _write(text, name="a.csv"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", WITH_ID + "a,7,10,1,,\nb,,20,1,a,5\nc,10,30,1,,0\nd,,40,1,b,1\n"),
        ("a.csv", WITHOUT + "7,10,1,,\n,20,1,0,5\n10,30,1,,\n,40,1,1,1\n"),
        # as a table with missing numbers is often written
        ("a.csv", WITHOUT + "7,10,1,,\n,20,1,0.0,5\n10,30,1,,\n,40,1,1.0,1\n"),
        # rows in any order; a recorded arrival, as late as the answer took
        ("a.csv", WITH_ID + "d,,40,1,b,1\nb,12,20,1,a,5\na,7,10,1,,\nc,10,30,1,,\n"),
        (
            "a.jsonl",
            "\n".join(
                json.dumps({"prompt_tokens": p, "output_tokens": 1, **more})
                for p, more in [
                    (10, {"id": 1, "arrival_s": 7}),
                    (20, {"id": 2, "after": 1, "delay_s": 5}),
                    (30, {"id": 3, "arrival_s": 10, "after": None}),
                    (40, {"id": 4, "after": 2, "delay_s": 1}),
                ]
            ),
        ),
    ],
)
def test_rows_name_those_they_wait_for_by_id_or_number(write, name, text):
    trace = read_trace(write(text, name))
    # in order of arrival if answers took no time: a at 0, c at 3, b at 0 + 5, d at 5 + 1
    assert trace.table.prompt_tokens.tolist() == [10, 30, 20, 40]
    assert trace.table.arrival_s.tolist() == [0.0, 3.0, 5.0, 6.0]
    assert trace.table.after.tolist() == [-1, -1, 0, 2]
    assert trace.table.delay_s.tolist() == [0.0, 0.0, 5.0, 1.0]
    # two come by themselves in 3 s, and each brings another: 1/3 * 2
    assert trace.table.rate_rps == pytest.approx(2 / 3)
    assert trace.headline() == (
        f"{name}: 4 requests, 2 by themselves over 3 s, 0.6667/s in the long run, as recorded, and"
        " 2 after the answers to others"
    )
    assert trace.counts()["waiting_requests"] == 2


def test_parquet_rows_wait_as_well(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "arrival_s": [7.0, None],
        "prompt_tokens": [10, 20],
        "output_tokens": [1, 1],
        "after": [None, 0.0],
        "delay_s": [float("nan"), 5.0],
    }
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    table = read_trace(tmp_path / "a.parquet").table
    assert table.after.tolist() == [-1, 0]
    assert table.arrival_s.tolist() == [0.0, 5.0]


def test_numbers_count_within_a_file_of_a_folder(write, tmp_path):
    write(WITHOUT + "0,10,1,,\n,20,1,0,1\n", "1.csv")
    write(WITHOUT + "9,30,1,,\n,40,1,0,1\n", "2.csv")
    table = read_trace(tmp_path).table
    assert table.prompt_tokens.tolist() == [10, 20, 30, 40]
    assert table.after.tolist() == [-1, 0, -1, 2]


def test_a_row_that_arrives_with_the_one_it_waits_for_comes_after_it(write):
    table = read_trace(write(WITHOUT + ",10,1,1,\n0,20,1,,\n0,30,1,,\n")).table
    assert table.prompt_tokens.tolist() == [20, 30, 10]
    assert table.after.tolist() == [-1, -1, 0]


WRONG = {
    "unknown id": (WITH_ID + "a,0,1,1,,\nb,,1,1,x,5\n", "line 3: after is 'x', and no row has"),
    "unknown number": (WITHOUT + "0,1,1,,\n,1,1,7,5\n", "line 3: after is row 7, which is none"),
    "no number": (WITHOUT + "0,1,1,,\n,1,1,-1,5\n", "line 3: column after: '-1' must be a whole"),
    "two of an id": (
        WITH_ID + "a,0,1,1,,\na,,1,1,a,5\n",
        "line 3: id 'a' is that of a.csv, line 2",
    ),
    "itself": (WITH_ID + "a,0,1,1,,\nb,,1,1,b,5\n", "line 3: after is its own id 'b'"),
    "its own number": (WITHOUT + "0,1,1,,\n,1,1,1,5\n", "line 3: after is its own row number 1"),
    "circle": (WITH_ID + "a,0,1,1,,\nb,,1,1,c,\nc,,1,1,b,\n", "line 3: it waits for a.csv, line 4"),
    "delay below 0": (WITH_ID + "a,0,1,1,,\nb,,1,1,a,-5\n", "line 3, column delay_s: '-5' must be"),
    "delay of words": (WITH_ID + "a,0,1,1,,\nb,,1,1,a,5 s\n", "line 3, column delay_s: '5 s' is"),
    "too early": (WITH_ID + "a,0,1,1,,\nb,2,1,1,a,5\n", "line 3: arrival_s is 2, but it waits for"),
    "delay after none": (WITH_ID + "a,0,1,1,,\nb,2,1,1,,5\n", "line 3: delay_s is 5, but after is"),
    "neither": (WITH_ID + "a,0,1,1,,\nb,,1,1,,\n", "line 3: arrival_s and after are both empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_nobody_can_wait_for_is_refused_with_its_line(write, case):
    text, said = WRONG[case]
    with pytest.raises(WorkloadError) as caught:
        read_trace(write(text))
    assert str(caught.value).startswith(f"a.csv, {said}")


@pytest.mark.parametrize("case", WRONG)
def test_such_rows_can_be_left_out_and_counted(write, case):
    text, said = WRONG[case]
    trace = read_trace(write(text), on_bad_row="skip")
    assert len(trace.table) == 1
    assert trace.first_bad.startswith(f"a.csv, {said}")
    assert trace.num_skipped == text.count("\n") - 2


def test_whoever_waits_for_a_row_that_is_left_out_is_left_out_too(write):
    text = WITH_ID + "a,0,10,1,,\nb,,ten,1,a,1\nc,,11,1,b,2\nd,,12,1,c,2\ne,7,13,1,,\n"
    trace = read_trace(write(text), on_bad_row="skip")
    assert trace.table.prompt_tokens.tolist() == [10, 13]
    assert trace.num_skipped == 3
    hashed = "arrival_s,prompt_tokens,output_tokens,after,prefix_hashes\n"
    text = hashed + "0,600,1,,1 2\n,600,1,0,1 2 3\n,600,1,1,1\n1,600,1,,1\n2,600,1,,1\n"
    trace = read_trace(write(text), on_bad_row="skip", hash_block_tokens=512)
    assert trace.table.after.tolist() == [-1, -1, -1]
    assert trace.num_skipped == 2


def test_whoever_waits_for_a_request_too_long_is_counted_with_it(write):
    path = write(WITH_ID + "a,0,10,1,,\nb,,99,1,a,1\nc,,19,1,b,2\nd,7,69,1,,\n")
    read = read_trace(path, max_context_tokens=80, too_long="skip")
    assert read.table.prompt_tokens.tolist() == [10, 69]
    assert read.remarks() == [
        "a.csv: left out 2 of 4 requests, as they or those they wait for exceed 80 tokens: 59.7% of"
        " all tokens are not played"  # 100 + 20 of 201
    ]
    cut = read_trace(path, max_context_tokens=80, too_long="cut")
    assert cut.table.after.tolist() == [-1, 0, 1, -1]
    with pytest.raises(WorkloadError, match="as all others or those that they wait for, exceeds 8"):
        read_trace(
            write(WITH_ID + "a,0,10,1,,\nb,,1,1,a,1\n"), max_context_tokens=8, too_long="skip"
        )


def test_a_trace_plays_as_a_closed_loop(write):
    path = write(WITH_ID + "a,0,900,40,,\nb,,950,30,a,2.5\nc,1,100,20,,\nd,,990,10,b,0\n")
    scenario = with_trace(parse_scenario(FLEET, "tiny.yaml"), path, rate_rps=2.0)
    sim = Simulator(scenario.spec, [scenario.episode(0)], asks=Asks(dispatch=NEVER))
    sim.advance()
    run = {row["prompt_tokens"]: row for row in sim.outcomes()}
    assert run[950]["arrival_s"] == run[900]["finish_s"] + 2.5
    assert run[990]["arrival_s"] == run[950]["finish_s"]
    # a and c bring two more in 1 s: 2 a second in the long run, as is asked for
    assert (run[900]["arrival_s"], run[100]["arrival_s"]) == (0.0, 1.0)


def chains(num=40, turns=5):
    """Chains that begin 10 s apart and go on every 3 s."""
    n = num * turns
    chain, turn = np.divmod(np.arange(n), turns)
    arrival_s = 10.0 * chain + 3.0 * turn
    order = np.argsort(arrival_s, kind="stable")
    place = np.argsort(order)
    after = np.where(turn == 0, -1, place[np.arange(n) - 1])
    return RequestTable.build(
        arrival_s[order],
        np.arange(1, n + 1)[order],
        np.ones(n),
        after=after[order],
        delay_s=np.where(turn == 0, 0.0, 3.0)[order],
    )


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_faster_chains_begin_faster_and_go_on_as_before(factor):
    table = chains()
    fast = table.scaled(factor)
    begins = fast.after < 0
    np.testing.assert_allclose(fast.arrival_s[begins], 10.0 * np.arange(40) / factor)
    waits = np.flatnonzero(~begins)
    np.testing.assert_allclose(fast.arrival_s[waits] - fast.arrival_s[fast.after[waits]], 3.0)
    # the prompts say which chain and turn each one is
    before = fast.prompt_tokens[fast.after[waits]]
    assert fast.prompt_tokens[waits].tolist() == (before + 1).tolist()
    # 39 begin in 390 s, times 5
    assert fast.rate_rps == pytest.approx(0.5 * factor)


def test_a_window_begins_amid_chains_and_says_how_many_it_cut(write):
    table = chains()
    rows = [
        f"{p},{t},{p},1,{'' if a < 0 else table.prompt_tokens[a]},{d}\n"
        for t, p, a, d in zip(
            table.arrival_s, table.prompt_tokens, table.after, table.delay_s, strict=True
        )
    ]
    path = write(WITH_ID + "".join(rows))
    config = TraceConfig(path=path)
    for seed in range(5):
        part = config.table(np.random.default_rng(seed), num_requests=50)
        first = int(part.prompt_tokens[0])
        at = int(np.flatnonzero(table.prompt_tokens == first)[0])
        assert part.prompt_tokens.tolist() == table.prompt_tokens[at : at + 50].tolist()
        cut = (table.after[at : at + 50] >= 0) & (table.after[at : at + 50] < at)
        assert (part.after[cut] == -1).all()
        # those go on as if answers took no time
        expected_s = table.arrival_s[at : at + 50] - table.arrival_s[at]
        np.testing.assert_allclose(part.arrival_s, expected_s)
        got = config.num_cut_off(np.random.default_rng(seed), num_requests=50)
        assert got == cut.sum()
        assert 0 < got < 4
    scenario = parse_scenario(FLEET, "tiny.yaml").model_copy(
        update={"workload": config, "num_requests": 50}
    )
    notes = plan(problem_of(scenario), scenario, [0, 1], [1.0]).notes
    assert any("requests of a window, on average, wait for one before it" in n for n in notes)
    whole = plan(problem_of(scenario), scenario, [0], [1.0], 200).notes
    assert not any("wait for one before it" in note for note in whole)


def test_an_open_trace_may_have_ids_of_any_kind(write):
    trace = read_trace(write("id,arrival_s,prompt_tokens,output_tokens\nx,0,1,1\nx,1,1,1\n"))
    assert len(trace.table) == 2
    assert trace.table.num_waiting == 0


def test_it_is_open_where_that_is_asked_for(write):
    path = write(WITH_ID + "a,0,10,1,,\nb,,20,1,a,5\nc,3,30,1,,\n")
    table = read_trace(path, wait_for_answers=False).table
    assert table.num_waiting == 0
    assert table.arrival_s.tolist() == [0.0, 3.0, 5.0]
    assert read_trace(path).table.num_waiting == 1
