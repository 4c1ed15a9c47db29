"""Recorded sessions as a workload: who waits for whom, what is shared, and how they come."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from servegym.cluster.simulator import Simulator
from servegym.cluster.state import NEVER, Asks
from servegym.errors import WorkloadError
from servegym.evaluate.repeats import plan
from servegym.problems.registry import problem_of
from servegym.scenario import parse_scenario
from servegym.traced_scenario import with_trace
from servegym.workflow.workloads.weka import read_weka
from servegym.workloads.config import TraceConfig
from servegym.workloads.readers import read_trace
from servegym.workloads.sessions import Sessions

FLEET = """
name: tiny
engine: {block_size: 64}
fleet: [{gpu: H100-SXM-80GB}]
workload: {kind: generated, rate_rps: 1.0}
num_requests: 60
"""


def row(session, agent, prompt, output, *, lcp=0, gap=0.0, kind="n", **more):
    return {
        "session": session,
        "agent": agent,
        "kind": kind,
        "spawned_agent": None,
        "input_tokens": prompt,
        "output_tokens": output,
        "lcp_prev_blocks": lcp,
        "think_time_s": gap,
        "stop": "tool_use",
        "duplicate_session": False,
        **more,
    }


def begun(session, agent):
    return row(session, "main", None, None, kind="subagent", spawned_agent=agent)


#: Calls of 1000 + 50, 1200 + 60, two sub-agents (one and two calls), 1500 + 70; a rewritten prompt
#: that keeps 5 blocks; and one that goes on from it.
SESSION = [
    row("s", "main", 1000, 50),
    row("s", "main", 1200, 60, lcp=15, gap=4.0),
    begun("s", "one"),
    begun("s", "two"),
    row("s", "one", 500, 20),
    row("s", "two", 600, 30),
    row("s", "two", 700, 0, lcp=9, gap=2.0),
    row("s", "main", 1500, 70, lcp=18, gap=33.0),
    row("s", "main", 400, 10, lcp=5, gap=9.0),
    row("s", "main", 450, 10, lcp=6, gap=1.0),
]


@pytest.fixture
def write(tmp_path):
    def _write(rows, name="sessions.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        return str(path)

    return _write


def prefixes(table, i):
    at = slice(table.prefix_offsets[i], table.prefix_offsets[i + 1])
    return list(zip(table.prefix_keys[at].tolist(), table.prefix_ends[at].tolist(), strict=True))


def test_a_call_waits_for_the_one_before_and_its_gap(write):
    trace = read_trace(write(SESSION))
    table = trace.table
    by_prompt = {int(p): i for i, p in enumerate(table.prompt_tokens)}
    waits = {
        p: (-1 if table.after[i] < 0 else int(table.prompt_tokens[table.after[i]]), delay)
        for p, i in by_prompt.items()
        for delay in [float(table.delay_s[i])]
    }
    assert waits == {
        1000: (-1, 0.0),
        1200: (1000, 4.0),
        500: (1200, 0.0),  # sub-agents begin with the answer of the call before them
        600: (1200, 0.0),
        700: (600, 2.0),
        1500: (700, 0.0),  # and the next call with the answer of the one that takes longest
        400: (1500, 9.0),
        450: (400, 1.0),
    }
    arrival_s = {p: float(table.arrival_s[i]) for p, i in by_prompt.items()}
    assert arrival_s == {1000: 0, 1200: 4, 500: 4, 600: 4, 700: 6, 1500: 6, 400: 15, 450: 16}
    assert table.output_tokens[by_prompt[700]] == 1  # given up before its first token
    assert trace.headline() == "sessions.jsonl: 8 calls of 1 recorded sessions"


def test_calls_share_what_was_recorded_and_the_answer_where_the_prompt_holds_it(write):
    table = read_trace(write(SESSION)).table
    by_prompt = {int(p): prefixes(table, i) for i, p in enumerate(table.prompt_tokens)}
    end = np.iinfo(np.int32).max
    # 15 and 18 blocks of 64 are all whole blocks of 1000 and 1200: those calls go on from them
    ((text, last),) = by_prompt[1000]
    assert last == end
    assert by_prompt[1200] == by_prompt[1500] == [(text, end)]
    # the rewritten prompt keeps 5 * 64 tokens, and the next one goes on from it
    assert by_prompt[400][0] == (text, 320)
    assert by_prompt[400][1][0] != text
    assert by_prompt[450] == by_prompt[400]
    # sub-agents have texts of their own
    assert by_prompt[600] == by_prompt[700]
    assert len({by_prompt[p][0][0] for p in (1000, 500, 600)}) == 3


def test_an_answer_that_the_next_prompt_has_no_room_for_is_not_shared(write):
    rows = [row("s", "main", 1000, 500), row("s", "main", 1100, 5, lcp=15, gap=1.0)]
    table = read_trace(write(rows)).table
    first, second = prefixes(table, 0), prefixes(table, 1)
    assert second[0] == (first[0][0], 960)
    assert second[1][0] != first[0][0]


def test_sessions_are_the_jobs_that_workflows_read(write):
    path = write(SESSION)
    (job,) = read_weka(Path(path))
    table = read_trace(path).table
    calls = job.prompt_tokens > 0
    assert sorted(job.prompt_tokens[calls]) == sorted(table.prompt_tokens)
    assert sorted(job.output_tokens[calls]) == sorted(table.output_tokens)
    # all recorded gaps that no sub-agent filled are tools there and delays here
    assert job.tool_s.sum() == table.delay_s.sum() == 16.0


def many(write, num=40, calls=6):
    rows = []
    for s in range(num):
        rows += [
            row(f"s{s}", "main", 1000 + 100 * k, 20, lcp=(900 + 100 * k) // 64 if k else 0, gap=5.0)
            for k in range(calls)
        ]
    return write(rows)


def test_a_stream_has_the_rate_and_is_steady_from_its_first_call_on(write):
    config = TraceConfig(path=many(write), rate_rps=4.0)
    tables = [config.table(np.random.default_rng(s), num_requests=300) for s in range(40)]
    # 300 calls in sessions of 6: a standard error of some 4 % each, of 40 tables 0.7 %
    rates = [300 / t.arrival_s[-1] for t in tables]
    assert np.mean(rates) == pytest.approx(4.0, rel=0.04)
    early = np.mean([(t.arrival_s < 10.0).sum() for t in tables])
    assert early == pytest.approx(40, rel=0.1)
    twice = [config.table(np.random.default_rng(s), num_requests=300, load=2.0) for s in range(40)]
    assert np.mean([300 / t.arrival_s[-1] for t in twice]) == pytest.approx(8.0, rel=0.04)


def test_a_stream_keeps_who_waits_for_whom(write):
    table = TraceConfig(path=many(write), rate_rps=4.0).table(
        np.random.default_rng(0), num_requests=300
    )
    waits = np.flatnonzero(table.after >= 0)
    before = table.after[waits]
    assert (table.session[waits] == table.session[before]).all()
    assert (table.prompt_tokens[waits] == table.prompt_tokens[before] + 100).all()
    assert (table.delay_s[waits] == 5.0).all()
    np.testing.assert_allclose(table.arrival_s[waits] - table.arrival_s[before], 5.0)
    # by themselves come first calls, and the next ones of sessions under way at time 0
    alone = np.flatnonzero(table.after < 0)
    under_way = alone[table.prompt_tokens[alone] > 1000]
    assert 0 < len(under_way) < 40
    assert table.arrival_s[under_way].max() <= 5.0
    # each session has its own text, though drawn twice
    keys = {int(s): int(k) for s, k in zip(table.session, table.prefix_keys, strict=True)}
    assert len(set(keys.values())) == len(keys)


def test_recorded_sessions_play_closed_and_find_their_contexts(write):
    scenario = with_trace(parse_scenario(FLEET, "tiny.yaml"), many(write), rate_rps=2.0)
    episode = scenario.episode(0)
    sim = Simulator(scenario.spec, [episode], asks=Asks(dispatch=NEVER))
    sim.advance()
    run, table = sim.outcomes(), episode.table
    waits = table.after >= 0
    np.testing.assert_array_equal(
        run["arrival_s"][waits], run["finish_s"][table.after[waits]] + 5.0
    )
    # the prompt before and its answer of 20 tokens, of which the last has no KV yet
    before = table.prompt_tokens[table.after[waits]]
    assert run["cached_tokens"][waits].tolist() == ((before + 19) // 64 * 64).tolist()
    assert plan(problem_of(scenario), scenario, [0, 1], [1.0]).notes == []


def test_a_call_too_long_ends_its_session_or_is_cut(write):
    path = many(write, num=3)
    # prompts of 1000, 1100, ... 1500 and 20 tokens more
    skipped = read_trace(path, max_context_tokens=1200, too_long="skip")
    assert sorted(set(skipped.table.prompt_tokens.tolist())) == [1000, 1100]
    assert skipped.counts()["left_out_requests"] == 12
    cut = read_trace(path, max_context_tokens=1200, too_long="cut")
    assert sorted(set(cut.table.prompt_tokens.tolist())) == [1000, 1100, 1180]
    with pytest.raises(WorkloadError, match=r"session s0: a prompt of 1,200 and an output of 20"):
        read_trace(path, max_context_tokens=1200)


def test_a_folder_of_sessions_is_read_as_one(write, tmp_path):
    many(write, num=3)
    write(SESSION, "more.jsonl")
    trace = read_trace(tmp_path)
    assert len(trace.table) == 3 * 6 + 8
    assert len(trace.sessions) == 4


def test_sessions_want_a_rate_and_no_options_of_other_traces(write):
    path = write(SESSION)
    with pytest.raises(WorkloadError, match="say with rate_rps how many calls"):
        TraceConfig(path=path).table(np.random.default_rng(0), num_requests=5)
    for options, said in (
        ({"time_unit": "ms"}, "--time-unit,"),
        ({"hash_block_tokens": 64}, "--hash-block-tokens,"),
        ({"on_bad_row": "skip"}, "--on-bad-row skip,"),
        ({"wait_for_answers": False}, "--no-wait-for-answers,"),
    ):
        with pytest.raises(WorkloadError, match=f"leave {said}"):
            read_trace(path, **options)
    alone = [begun("s", "one"), row("s", "one", 5, 5)]
    with pytest.raises(WorkloadError, match=r"jsonl, session s: agent main must have calls"):
        read_trace(write(alone))
    with pytest.raises(WorkloadError, match="rows of session s are apart"):
        read_trace(write([*SESSION, row("t", "main", 1, 1), row("s", "main", 1, 1)]))


@pytest.mark.parametrize(
    ("column", "value"),
    [("session", ["s"]), ("session", None), ("agent", {}), ("spawned_agent", None)],
)
def test_a_session_or_agent_without_a_name_is_refused_with_its_line(write, column, value):
    rows = [dict(one) for one in SESSION]
    rows[2][column] = value
    with pytest.raises(WorkloadError, match=f"line 3, column {column}: .* must be text or"):
        read_trace(write(rows))


def test_a_stream_of_one_short_session_repeats_it():
    pool = Sessions(
        session=np.zeros(2, np.int64),
        prompt_tokens=np.array([100, 200]),
        output_tokens=np.array([10, 10]),
        after=np.array([-1, 0]),
        delay_s=np.array([0.0, 3.0]),
        continues=np.array([-1, 0]),
        shared_tokens=np.array([0, 100]),
        system_tokens=64,
    )
    table = pool.stream(np.random.default_rng(0), 50, 1.0)
    assert set(table.prompt_tokens.tolist()) == {100, 200}
    # all begin with one text of 64 tokens
    firsts = [prefixes(table, i)[0] for i in range(50)]
    assert set(firsts) == {(1, 64)}
