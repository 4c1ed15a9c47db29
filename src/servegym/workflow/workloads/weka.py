"""Recorded sessions of a coding agent (WEKA traces) as jobs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from servegym.typing import FloatArray
from servegym.workflow.job import Job, JobBuilder
from servegym.workflow.workloads.coding_agent import CALL, PAUSE, SUB_CALL, SUB_TOOL, TOOL
from servegym.workloads.recorded import MAIN, RecordedCall, read_sessions

#: A prompt that begins with less of the shorter one, itself or the one before, was rewritten.
REWRITTEN_BELOW = 0.9


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
    sessions = read_sessions(path, max_context_tokens=max_context_tokens, max_pause_s=max_pause_s)
    calls = [call for one in sessions for chain in one.agents.values() for call in chain]
    mean = sum(call.output_tokens for call in calls) / len(calls)
    gap_s = {
        asked: _mean([call.gap_s for call in calls if call.asks_for_tool == asked])
        for asked in (True, False)
    }
    return [_job(one.agents, mean, gap_s) for one in sessions if one.agents.get(MAIN)]


def _job(agents: dict[str, list[RecordedCall]], mean: float, gap_s: dict[bool, float]) -> Job:
    builder = JobBuilder("coding-agent")

    def chain(agent: str, parent: int | None) -> int:
        """Add an agent's calls after a stage; returns the last of them."""
        main = agent == MAIN
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

    chain(MAIN, None)
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
