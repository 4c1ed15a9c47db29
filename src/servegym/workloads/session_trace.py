"""Traces of recorded sessions, whose calls have no time but that after the answer before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from servegym.errors import WorkloadError
from servegym.workloads.recorded import is_sessions, read_sessions
from servegym.workloads.records import columns_of, records
from servegym.workloads.sessions import recorded_sessions
from servegym.workloads.shortening import TooLong, within
from servegym.workloads.trace import Trace


def holds_sessions(file: Path) -> bool:
    """Whether the first row of a file is one of recorded sessions."""
    for line, record in records(file):
        try:
            return is_sessions(columns_of(f"{file.name}, line {line}", record))
        except WorkloadError:
            return False
    return False


def read_session_trace(
    name: str, files: Sequence[Path], max_context_tokens: int | None, too_long: TooLong
) -> Trace:
    """Read recorded sessions as calls that wait for one another.

    Args:
        name: Of the trace.
        files: Of rows as `recorded.read_sessions` takes them.
        max_context_tokens: Most tokens of prompt and output together; None: no limit.
        too_long: What happens to a longer call; one that is left out ends its session.

    Raises:
        WorkloadError: If a file or a row cannot be used.
    """
    pool, where = recorded_sessions([one for file in files for one in read_sessions(file)])
    length = within(
        pool.prompt_tokens,
        pool.output_tokens,
        where,
        max_context_tokens,
        too_long,
        after=pool.after,
    )
    pool = pool.cut(length.prompt_tokens, length.output_tokens, length.kept)
    return Trace(
        pool.at_once(),
        name,
        num_skipped=0,
        first_bad="",
        class_given=np.zeros(len(pool.session), np.bool_),
        time_unit="s",
        hash_block_tokens=None,
        shortened=length.shortened,
        concluded=(
            f"{name} has no common time of its {len(pool):,} sessions: they begin at random, in a"
            " Poisson process, each seed drawing others of them with replacement",
        ),
        sessions=pool,
    )
