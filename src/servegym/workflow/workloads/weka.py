"""Recorded sessions of a coding agent (WEKA traces) as jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from servegym.errors import WorkloadError
from servegym.typing import FloatArray
from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.coding_agent import CALL, PAUSE, SUB_CALL, SUB_TOOL, TOOL
from servegym.workloads.cells import finite, whole
from servegym.workloads.records import columns_of, records

_COLUMNS = {
    *("session", "agent", "kind", "spawned_agent", "input_tokens", "output_tokens"),
    *("lcp_prev_blocks", "think_time_s", "stop", "duplicate_session"),
}
_BLOCK_TOKENS = 64
_MAIN = "main"
_MOST = 2**31 - 1
#: A prompt that begins with less of the shorter one, itself or the one before, was rewritten.
REWRITTEN_BELOW = 0.9


@dataclass(frozen=True)
class _Call:
    """One call as it was recorded."""

    prompt_tokens: int
    output_tokens: int
    shared_tokens: int
    gap_s: float
    asks_for_tool: bool
    spawned: tuple[str, ...]  # sub-agents that ran between this call and the next


def read_weka(
    path: Path, *, max_context_tokens: int | None = None, max_pause_s: float | None = None
) -> list[Job]:
    """Read every session as a job, labelled as those of `CodingAgent`.

    A call waits for the one before it, and for the time that passed between them: a tool where the
    call before asked for one, else a pause. Sub-agents start after the last call before they
    appear, and the next call waits for them. What a prompt shares with the one before is counted in
    blocks of 64 tokens, as recorded; lengths are known beforehand as the mean of the file. A call
    that was given up before its first token counts as one of one token.

    Args:
        path: Parquet or JSON lines with one row a call, of the columns session, agent, kind,
            spawned_agent, input_tokens, output_tokens, lcp_prev_blocks, think_time_s, stop and
            duplicate_session; the rows of a session follow each other.
        max_context_tokens: A session ends before the first call beyond it; None: no limit.
        max_pause_s: Longer gaps are cut to it; None: none is.

    Returns:
        Jobs in order of the file; sessions marked as duplicates are left out, and so are those
        whose first call is beyond `max_context_tokens`.

    Raises:
        WorkloadError: If the file cannot be read, lacks a column or has a value that is none; if
            a session's rows are apart, or an agent was never begun.
    """
    if ".csv" in path.name:
        raise WorkloadError(f"cannot read {path.name}: sessions are Parquet or JSON lines")
    if max_context_tokens is not None and max_context_tokens < 1:
        raise WorkloadError(f"max_context_tokens must be at least 1, got {max_context_tokens}")
    limit = 2**62 if max_context_tokens is None else max_context_tokens
    sessions, seen = [], set()
    for session, rows in groupby(_rows(path), key=lambda row: row["session"]):
        if session in seen:
            raise WorkloadError(
                f"{path.name}: rows of session {session} are apart: sort them by session"
            )
        seen.add(session)
        sessions.append(_agents(f"{path.name}, session {session}", list(rows), limit, max_pause_s))
    calls = [call for agents in sessions for chain in agents.values() for call in chain]
    if not calls:
        raise WorkloadError(f"{path.name} holds no call of at most {limit} tokens")
    mean = sum(call.output_tokens for call in calls) / len(calls)
    gap_s = {
        asked: _mean([call.gap_s for call in calls if call.asks_for_tool == asked])
        for asked in (True, False)
    }
    return [_job(agents, mean, gap_s) for agents in sessions if agents.get(_MAIN)]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line, record in records(path):
        where = f"{path.name}, line {line}"
        row = columns_of(where, record)
        missing = sorted(_COLUMNS - row.keys())
        if missing:
            raise WorkloadError(f"{where}: no column {', '.join(missing)}")
        if row["duplicate_session"]:
            continue
        if row["kind"] != "subagent":
            row["input_tokens"] = whole(where, "input_tokens", row["input_tokens"], 1, _MOST)
            for column in ("output_tokens", "lcp_prev_blocks"):
                row[column] = whole(where, column, row[column], 0, _MOST)
            gap_s = row["think_time_s"]
            pause_s = 0.0 if gap_s is None else finite(where, "think_time_s", gap_s)
            if pause_s < 0:
                raise WorkloadError(f"{where}, column think_time_s: {gap_s!r} must be at least 0")
            row["think_time_s"] = pause_s
        yield row


def _agents(
    where: str, rows: list[dict[str, Any]], limit: int, max_pause_s: float | None
) -> dict[str, list[_Call]]:
    """Calls of each agent of a session, in order."""
    by_agent: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_agent.setdefault(row["agent"], []).append(row)
    begun = [row["spawned_agent"] for row in rows if row["kind"] == "subagent"]
    agents_there = Counter(begun) + Counter([_MAIN])
    if agents_there.keys() != by_agent.keys() or set(agents_there.values()) != {1}:
        odd = sorted(map(str, agents_there.keys() ^ by_agent.keys()))
        odd += [str(agent) for agent, count in agents_there.items() if count > 1]
        raise WorkloadError(
            f"{where}: agent {odd[0]} must have calls, and be begun once, by a row of kind subagent"
        )
    agents = {}
    for agent, mine in by_agent.items():
        calls: list[_Call] = []
        spawned: list[str] = []
        for row in mine:
            if row["kind"] == "subagent":
                spawned.append(row["spawned_agent"])
                continue
            if row["input_tokens"] + row["output_tokens"] > limit:
                break
            if calls:
                gap_s = row["think_time_s"]
                gap_s = gap_s if max_pause_s is None else min(gap_s, max_pause_s)
                calls[-1] = _followed(calls[-1], gap_s, spawned)
                spawned = []
            calls.append(
                _Call(
                    prompt_tokens=row["input_tokens"],
                    output_tokens=max(1, row["output_tokens"]),
                    shared_tokens=_BLOCK_TOKENS * row["lcp_prev_blocks"],
                    gap_s=0.0,
                    asks_for_tool=row["stop"] == "tool_use",
                    spawned=(),
                )
            )
        agents[agent] = calls
    return agents


def _followed(call: _Call, gap_s: float, spawned: list[str]) -> _Call:
    return _Call(
        call.prompt_tokens,
        call.output_tokens,
        call.shared_tokens,
        gap_s,
        call.asks_for_tool,
        tuple(spawned),
    )


def _job(agents: dict[str, list[_Call]], mean: float, gap_s: dict[bool, float]) -> Job:
    builder = JobBuilder("coding-agent")

    def chain(agent: str, parent: int | None) -> int:
        """Add an agent's calls after a stage; returns the last of them."""
        main = agent == _MAIN
        previous, waits = parent, list[int]()
        calls = agents[agent]
        for i, call in enumerate(calls):
            stage = builder.llm(
                CALL if main else SUB_CALL,
                call.prompt_tokens,
                call.output_tokens,
                max(1.0, mean),
                hidden=previous is not None,
            )
            if previous is not None:
                shared = min(call.shared_tokens, call.prompt_tokens) if i else 0
                builder.edge(previous, stage, shared_tokens=shared)
            for wait in waits:
                builder.edge(wait, stage)
            previous = stage
            if i + 1 == len(calls):
                break
            # a gap with sub-agents in it is the time that they took
            waits = [chain(name, stage) for name in call.spawned if agents.get(name)]
            if not waits:
                asked = call.asks_for_tool
                label = (TOOL if asked else PAUSE) if main else SUB_TOOL
                waits = [builder.tool(label, call.gap_s, gap_s[asked], hidden=True)]
                builder.edge(stage, waits[0])
        assert previous is not None
        return previous

    chain(_MAIN, None)
    return builder.build()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def session_marginals(jobs: Sequence[Job]) -> dict[str, FloatArray]:
    """Collect what `CodingAgent` draws from sessions, recorded or drawn.

    Returns:
        By name of its fields: numbers of calls, tokens or seconds, as many as there are of each;
        growth is that of prompts that were not rewritten. "rewrites" and "pauses" hold 1 where a
        prompt was rewritten or a turn ended, else 0.
    """
    found: dict[str, list[FloatArray]] = {}

    def add(name: str, values: ArrayLike) -> None:
        found.setdefault(name, []).append(np.atleast_1d(np.asarray(values, float)))

    for job in jobs:
        main = job.label == CALL
        add("calls", main.sum())
        add("first_prompt", job.prompt_tokens[0])
        add("output", job.output_tokens[main])
        add("sub_output", job.output_tokens[job.label == SUB_CALL])
        between = main[job.parent] & main[job.child]
        before, after = (job.prompt_tokens[ends[between]] for ends in (job.parent, job.child))
        rewritten = job.shared_tokens[between] < REWRITTEN_BELOW * np.minimum(before, after)
        add("rewrites", rewritten)
        add("growth", (after - before)[~rewritten])
        add("tool", job.tool_s[job.label == TOOL])
        add("pause", job.tool_s[job.label == PAUSE])
        add("pauses", (job.label == PAUSE)[(job.label == TOOL) | (job.label == PAUSE)])
    return {name: np.concatenate(parts) for name, parts in found.items()}
