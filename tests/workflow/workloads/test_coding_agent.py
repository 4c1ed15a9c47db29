"""Sessions of a coding agent: drawn ones against recorded ones, and the reader of these."""

from __future__ import annotations

import json

import numpy as np
import pytest

from servegym.errors import WorkloadError
from servegym.workflow.job import StageKind
from servegym.workflow.workloads.coding_agent import CALL, PAUSE, SUB_CALL, TOOL, CodingAgent
from servegym.workflow.workloads.weka import read_weka, session_marginals


def row(session, agent, idx, prompt, output, *, lcp=0, gap=0.0, stop="tool_use", kind="n", **more):
    return {
        "session": session,
        "agent": agent,
        "idx": idx,
        "kind": kind,
        "spawned_agent": None,
        "input_tokens": prompt,
        "output_tokens": output,
        "lcp_prev_blocks": lcp,
        "think_time_s": gap,
        "stop": stop,
        "duplicate_session": False,
        **more,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


SUB = {"kind": "subagent", "spawned_agent": "agent_001"}
SESSION = [
    row("s", "main", 0, 1000, 50),
    row("s", "main", 1, 1200, 60, lcp=15, gap=4.0, stop="end_turn"),
    row("s", "main", 2, None, None, **SUB),
    row("s", "agent_001", 0, 500, 20),
    row("s", "agent_001", 1, 600, 0, lcp=7, gap=2.0),
    row("s", "main", 3, 1500, 70, lcp=18, gap=33.0),
    row("s", "main", 4, 1700, 80, lcp=23, gap=9.0),
]


def test_recorded_session_becomes_calls_with_what_lay_between_them(tmp_path):
    (job,) = read_weka(write(tmp_path / "one.jsonl", SESSION))
    assert job.label.tolist() == [CALL, TOOL, CALL, SUB_CALL, 4, SUB_CALL, CALL, TOOL, CALL]
    edges = list(
        zip(job.parent.tolist(), job.child.tolist(), job.shared_tokens.tolist(), strict=True)
    )
    assert edges == [
        (0, 1, 0),
        (0, 2, 960),
        (1, 2, 0),
        (2, 3, 0),  # the sub-agent starts after the call before it and shares nothing
        (2, 6, 1152),
        (3, 4, 0),
        (3, 5, 448),
        (4, 5, 0),
        (5, 6, 0),  # the next call waits for it, in place of the recorded 33 s
        (6, 7, 0),
        (6, 8, 1472),
        (7, 8, 0),
    ]
    assert job.tool_s[[1, 4, 7]].tolist() == [4, 2, 9]
    assert job.output_tokens[5] == 1  # an empty answer is one token
    assert job.hidden.tolist() == [False] + [True] * 8
    mean = (50 + 60 + 20 + 1 + 70 + 80) / 6
    assert job.expected_output_tokens[0] == pytest.approx(mean)


def test_reader_leaves_out_duplicates_and_cuts_what_it_is_told_to(tmp_path):
    again = [{**r, "session": "t", "duplicate_session": True} for r in SESSION]
    file = write(tmp_path / "two.jsonl", SESSION + again)
    assert len(read_weka(file)) == 1
    (job,) = read_weka(file, max_context_tokens=1600, max_pause_s=3.0)
    assert job.prompt_tokens.max() == 1500
    assert job.tool_s.max() == 3.0
    with pytest.raises(WorkloadError, match="no call of at most 10 tokens"):
        read_weka(file, max_context_tokens=10)


def test_turn_that_ended_is_followed_by_a_pause(tmp_path):
    rows = [row("s", "main", 0, 100, 5, stop="end_turn"), row("s", "main", 1, 200, 5, lcp=1, gap=7)]
    (job,) = read_weka(write(tmp_path / "one.jsonl", rows))
    assert job.label.tolist() == [CALL, PAUSE, CALL]


def test_reader_names_what_is_missing(tmp_path):
    bad = {key: value for key, value in SESSION[0].items() if key != "stop"}
    with pytest.raises(WorkloadError, match=r"bad.jsonl, line 1: no column stop"):
        read_weka(write(tmp_path / "bad.jsonl", [bad]))
    (tmp_path / "bad.csv").write_text("session\n")
    with pytest.raises(WorkloadError, match="Parquet or JSON lines"):
        read_weka(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("line", "changes", "sentence"),
    [
        (1, {"input_tokens": None}, "line 1, column input_tokens: None is not a number"),
        (1, {"input_tokens": 0}, "line 1, column input_tokens: 0 must be a whole number from 1"),
        (2, {"output_tokens": -1}, "line 2, column output_tokens: -1 must be"),
        (2, {"lcp_prev_blocks": 1.5}, "line 2, column lcp_prev_blocks"),
        (2, {"think_time_s": float("nan")}, "line 2, column think_time_s: nan"),
        (2, {"think_time_s": -3.0}, "line 2, column think_time_s: -3.0 must be at least 0"),
        (4, {"agent": "agent_009"}, "session s: agent agent_009 must have calls, and be begun"),
        (3, {"spawned_agent": "main"}, "session s: agent agent_001 must have calls, and be begun"),
        (5, {"session": "t"}, "session t: agent"),
    ],
)
def test_reader_names_the_row_that_is_wrong(tmp_path, line, changes, sentence):
    rows = [r | changes if i == line else r for i, r in enumerate(SESSION, start=1)]
    with pytest.raises(WorkloadError, match=sentence):
        read_weka(write(tmp_path / "bad.jsonl", rows))


def test_rows_of_a_session_that_are_apart_are_no_two_sessions(tmp_path):
    other = [r | {"session": "t"} for r in SESSION]
    rows = [SESSION[0], *other, *SESSION[1:]]
    with pytest.raises(WorkloadError, match="session s"):
        read_weka(write(tmp_path / "bad.jsonl", rows))
    with pytest.raises(WorkloadError, match="rows of session s are apart"):
        read_weka(write(tmp_path / "bad.jsonl", [*SESSION, *other, *SESSION]))


def test_a_limit_of_nothing_is_no_absence_of_a_limit(tmp_path):
    with pytest.raises(WorkloadError, match="max_context_tokens must be at least 1, got 0"):
        read_weka(write(tmp_path / "one.jsonl", SESSION), max_context_tokens=0)


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    return [CodingAgent().job(rng) for _ in range(400)]


def test_calls_alternate_with_tools_and_pauses(drawn):
    assert drawn
    for job in drawn:
        main = np.flatnonzero(job.label == CALL)
        assert main[0] == 0
        assert not job.hidden[0]
        assert job.hidden[1:].all()
        assert job.kind[-1] == StageKind.LLM  # nobody waits for a tool after the last answer
        waits = np.isin(job.label, (TOOL, PAUSE)).sum()
        spawns = len(
            set(job.parent[(job.label[job.parent] == CALL) & (job.label[job.child] == SUB_CALL)])
        )
        assert waits + spawns == len(main) - 1


def test_no_call_is_beyond_the_context(drawn):
    assert drawn
    for job in drawn:
        assert (job.prompt_tokens + job.output_tokens).max() <= 200000
        assert job.tool_s[job.label == PAUSE].max(initial=0.0) <= 3600


def test_smaller_contexts_and_pauses_are_kept_to():
    family = CodingAgent(max_context_tokens=32768, max_pause_s=60.0)
    rng = np.random.default_rng(1)
    for _ in range(100):
        job = family.job(rng)
        assert (job.prompt_tokens + job.output_tokens).max() <= 32768
        assert job.tool_s[job.label == PAUSE].max(initial=0.0) <= 60


def test_some_sessions_wait_for_sub_agents(drawn):
    with_sub = [job for job in drawn if (job.label == SUB_CALL).any()]
    # 0.048 of sessions may, and those of some length do
    assert 2 <= len(with_sub) <= 30
    for job in with_sub:
        sub = np.flatnonzero(job.label == SUB_CALL)
        last = [s for s in sub if not np.isin(job.child[job.parent == s], sub).any()]
        followed = job.child[np.isin(job.parent, last)]
        assert (job.label[followed] == CALL).all()


def test_drawn_sessions_have_the_marginals_of_recorded_ones(weka_file):
    jobs = read_weka(weka_file)
    assert len(jobs) == 355
    assert sum((np.isin(job.label, (CALL, SUB_CALL))).sum() for job in jobs) > 20500
    rng = np.random.default_rng(0)
    family = CodingAgent(max_context_tokens=1_000_000, max_pause_s=86400.0)
    trace, drawn = (
        session_marginals(jobs),
        session_marginals([family.job(rng) for _ in range(1500)]),
    )
    # distances by `scripts/fit-sessions`, as docs/workflow-workloads.md gives them, and some room
    for name, limit in {
        "calls": 0.05,
        "first_prompt": 0.09,
        "output": 0.015,
        "growth": 0.03,
        "tool": 0.07,
        "pause": 0.06,
    }.items():
        at = np.concatenate([trace[name], drawn[name]])
        shares = [
            np.searchsorted(np.sort(x), at, side="right") / len(x)
            for x in (trace[name], drawn[name])
        ]
        assert np.abs(shares[0] - shares[1]).max() < limit, name
    for name in ("rewrites", "pauses"):
        assert drawn[name].mean() == pytest.approx(trace[name].mean(), rel=0.06)
