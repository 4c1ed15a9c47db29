"""Recorded sessions of coding agents (WEKA traces): the calls of each agent, in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from servegym.errors import WorkloadError
from servegym.workloads.cells import finite, whole
from servegym.workloads.records import columns_of, records

_COLUMNS = {
    *("session", "agent", "kind", "spawned_agent", "input_tokens", "output_tokens"),
    *("lcp_prev_blocks", "think_time_s", "stop", "duplicate_session"),
}
#: What shared beginnings are counted in.
BLOCK_TOKENS = 64
MAIN = "main"
_MOST = 2**31 - 1


@dataclass(frozen=True)
class RecordedCall:
    """One call as it was recorded."""

    prompt_tokens: int
    output_tokens: int
    shared_tokens: int
    gap_s: float
    asks_for_tool: bool
    spawned: tuple[str, ...]  # sub-agents that ran between this call and the next


@dataclass(frozen=True)
class RecordedSession:
    """The calls of a session's agents.

    Attributes:
        where: File and session, for messages.
        agents: Calls by agent, in order.
    """

    where: str
    agents: dict[str, list[RecordedCall]]


def is_sessions(columns: Mapping[str, object]) -> bool:
    """Whether a row is one of recorded sessions."""
    return columns.keys() >= _COLUMNS


def read_sessions(
    path: Path, *, max_context_tokens: int | None = None, max_pause_s: float | None = None
) -> list[RecordedSession]:
    """Read the sessions of a file.

    Args:
        path: Parquet or JSON lines with one row a call, of the columns session, agent, kind,
            spawned_agent, input_tokens, output_tokens, lcp_prev_blocks, think_time_s, stop and
            duplicate_session; the rows of a session follow each other.
        max_context_tokens: A session ends before the first call beyond it; None: no limit.
        max_pause_s: Longer gaps are cut to it; None: none is.

    Returns:
        Sessions in order of the file; sessions marked as duplicates are left out, and those whose
        first call is beyond `max_context_tokens` have no call of `MAIN`. A call that was given up
        before its first token counts as one of one token.

    Raises:
        WorkloadError: If the file cannot be read, lacks a column or has a value that is none; if
            a session's rows are apart, or an agent was never begun; if nothing is left.
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
        where = f"{path.name}, session {session}"
        agents = _agents(where, list(rows), limit, max_pause_s)
        sessions.append(RecordedSession(where, agents))
    if not any(calls for session in sessions for calls in session.agents.values()):
        raise WorkloadError(f"{path.name} holds no call of at most {limit} tokens")
    return sessions


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line, record in records(path):
        where = f"{path.name}, line {line}"
        row = columns_of(where, record)
        missing = sorted(_COLUMNS - row.keys())
        if missing:
            raise WorkloadError(f"{where}: no column {', '.join(missing)}")
        if row["duplicate_session"]:
            continue
        begins = row["kind"] == "subagent"
        for column in ("session", "agent", *(("spawned_agent",) if begins else ())):
            if not isinstance(row[column], str | int):
                raise WorkloadError(
                    f"{where}, column {column}: {row[column]!r} must be text or a whole number"
                )
        if not begins:
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
) -> dict[str, list[RecordedCall]]:
    """Calls of each agent of a session, in order."""
    by_agent: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_agent.setdefault(row["agent"], []).append(row)
    begun = [row["spawned_agent"] for row in rows if row["kind"] == "subagent"]
    agents_there = Counter(begun) + Counter([MAIN])
    if agents_there.keys() != by_agent.keys() or set(agents_there.values()) != {1}:
        odd = sorted(map(str, agents_there.keys() ^ by_agent.keys()))
        odd += [str(agent) for agent, count in agents_there.items() if count > 1]
        raise WorkloadError(
            f"{where}: agent {odd[0]} must have calls, and be begun once, by a row of kind subagent"
        )
    agents = {}
    for agent, mine in by_agent.items():
        calls: list[RecordedCall] = []
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
                RecordedCall(
                    prompt_tokens=row["input_tokens"],
                    output_tokens=max(1, row["output_tokens"]),
                    shared_tokens=BLOCK_TOKENS * row["lcp_prev_blocks"],
                    gap_s=0.0,
                    asks_for_tool=row["stop"] == "tool_use",
                    spawned=(),
                )
            )
        agents[agent] = calls
    return agents


def _followed(call: RecordedCall, gap_s: float, spawned: list[str]) -> RecordedCall:
    return RecordedCall(
        call.prompt_tokens,
        call.output_tokens,
        call.shared_tokens,
        gap_s,
        call.asks_for_tool,
        tuple(spawned),
    )
