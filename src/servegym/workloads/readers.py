"""Trace readers: Azure, Mooncake, Bailian, BurstGPT and the native format; bad rows are named.

Recorded sessions are another kind of file: see `session_trace`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import FloatArray, Int32Array, IntArray
from servegym.workloads.cells import finite, whole
from servegym.workloads.dialect import (
    AZURE,
    BAILIAN,
    BLOCK_TOKENS,
    NATIVE,
    PER_SECOND,
    ROUTER,
    Counts,
    Dialect,
    TimeUnit,
    dialect_of,
    units_of,
)
from servegym.workloads.followed import Followed, Links, link_followed, parse_followed
from servegym.workloads.records import READABLE, Record, columns_of, records
from servegym.workloads.session_trace import holds_sessions, read_session_trace
from servegym.workloads.shortening import TooLong, within
from servegym.workloads.table import BY_ITSELF, RequestTable
from servegym.workloads.trace import Trace
from servegym.workloads.waiting import Wait, link_waits, read_wait, with_followers

_INT16_MAX = 2**15 - 1
#: Instead of a position: the row waited for was left out.
_LOST = -3
_INT32_MAX = 2**31 - 1
_ALIASES = {
    "arrival_s": ("arrival_s", "TIMESTAMP", "Timestamp", "timestamp"),
    "prompt": ("prompt_tokens", "ContextTokens", "input_tokens", "input_length", "Request tokens"),
    "output": (
        "output_tokens",
        "GeneratedTokens",
        "output_length",
        "Response tokens",
    ),
}

#: What happens at a malformed row: the file is refused, or the row is counted and left out.
OnBadRow = Literal["error", "skip"]


class _Row(NamedTuple):
    where: str
    dialect: Dialect
    time: float
    prompt_tokens: int
    output_tokens: int
    slo_class: int | None
    tenant: int
    session: int
    hashes: list[int]
    chat: int
    parent_chat: int
    wait: Wait
    key: str
    e2e_s: float
    followed: Followed | None
    #: Place among all rows that were read, and of the row that it waits for; steps to the first.
    place: int = -1
    after: int = BY_ITSELF
    depth: int = 0


def read_trace(
    path: str | Path,
    *,
    on_bad_row: OnBadRow = "error",
    time_unit: TimeUnit | None = None,
    hash_block_tokens: int | None = None,
    max_context_tokens: int | None = None,
    too_long: TooLong = "error",
    wait_for_answers: bool = True,
) -> Trace:
    """Read a trace in any supported format, told by its columns.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`, the first two also gzipped; or a folder of such
            files that go on from one another, as a router's log does.
        on_bad_row: Refuse the file at the first malformed row, or count and leave out.
        time_unit: Of the column of times; None: as its dialect has it.
        hash_block_tokens: Tokens of a prefix hash; None: as its dialect has it, or as the counts
            of hashes say where they fit nothing else.
        max_context_tokens: Most tokens of prompt and output together; None: no limit.
        too_long: Refuse the file at a longer request, or count and cut or leave out.
        wait_for_answers: Whether requests wait for those that they followed, where the trace says
            so; else all come at their times.

    Returns:
        The trace.

    Raises:
        WorkloadError: If the file or a row cannot be used; it names file, line and column.
    """
    path = Path(path)
    files = _files(path)
    if files and holds_sessions(files[0]):
        given = (
            on_bad_row != "error",
            time_unit is not None,
            hash_block_tokens is not None,
            not wait_for_answers,
        )
        options = (
            "--on-bad-row skip",
            "--time-unit",
            "--hash-block-tokens",
            "--no-wait-for-answers",
        )
        for option, is_given in zip(options, given, strict=True):
            if is_given:
                raise WorkloadError(
                    f"{path.name} holds recorded sessions, whose columns say all and whose calls"
                    f" follow from one another: leave {option}, or its key in a scenario, out"
                )
        return read_session_trace(path.name, files, max_context_tokens, too_long)
    rows: list[_Row] = []
    bad: list[str] = []
    for file in files:
        for number, (line, record) in enumerate(records(file)):
            try:
                rows.append(_parse(file.name, number, line, record, time_unit))
            except WorkloadError as error:
                if on_bad_row == "error":
                    raise
                bad.append(str(error))
    if not rows:
        raise WorkloadError(f"{path.name} has no usable request" + (f": {bad[0]}" if bad else ""))
    if any(row.wait.after for row in rows):
        rows = _linked(path.name, rows, bad, skip=on_bad_row == "skip")
    counts = Counts(
        np.array([row.time for row in rows]),
        np.array([row.prompt_tokens for row in rows], np.int64),
        np.array([len(row.hashes) for row in rows], np.int64),
    )
    units = units_of(
        path.name,
        _one_dialect(rows),
        counts,
        [row.where for row in rows],
        time_unit=time_unit,
        block_tokens=hash_block_tokens,
        skip=on_bad_row == "skip",
    )
    bad += [
        f"{row.where}: {len(row.hashes)} hashes do not fit {row.prompt_tokens} tokens"
        for row, fits in zip(rows, units.fits.tolist(), strict=True)
        if not fits
    ]
    fits = units.fits.tolist()
    rows = sorted(
        (row for row, fit in zip(rows, fits, strict=True) if fit),
        key=lambda row: (row.time, row.depth),
    )
    after = _places(rows)
    lost = with_followers(after == _LOST, after)
    bad += [
        f"{row.where}: it waits for a row that is left out"
        for row, out in zip(rows, lost.tolist(), strict=True)
        if out
    ]
    rows = [row for row, out in zip(rows, lost.tolist(), strict=True) if not out]
    length = within(
        np.array([row.prompt_tokens for row in rows], np.int64),
        np.array([row.output_tokens for row in rows], np.int64),
        [row.where for row in rows],
        max_context_tokens,
        too_long,
        after=_places(rows),
    )
    rows = [row for row, kept in zip(rows, length.kept.tolist(), strict=True) if kept]
    keys, ends, offsets = prefix_segments(
        [row.hashes for row in rows], units.block_tokens or BLOCK_TOKENS
    )
    arrival = np.array([row.time for row in rows]) / PER_SECOND[units.time_unit]
    links = _links(rows, arrival)
    table = RequestTable.build(
        arrival - arrival[0],
        length.prompt_tokens,
        length.output_tokens,
        slo_class=np.array([row.slo_class or 0 for row in rows]),
        tenant=np.array([row.tenant for row in rows]),
        session=np.array(_sessions(rows)),
        after=links.after if links else _places(rows),
        delay_s=links.delay_s if links else np.array([row.wait.delay_s for row in rows]),
        prefix_offsets=offsets,
        prefix_keys=keys,
        prefix_ends=ends,
    )
    if not wait_for_answers:
        table, links = table.open_loop(), None
    return Trace(
        table,
        path.name,
        len(bad),
        bad[0] if bad else "",
        class_given=np.array([row.slo_class is not None for row in rows]),
        time_unit=units.time_unit,
        hash_block_tokens=units.block_tokens,
        shortened=length.shortened,
        links=links,
        concluded=units.remarks,
    )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.lower().endswith(READABLE))


def _linked(name: str, rows: list[_Row], bad: list[str], *, skip: bool) -> list[_Row]:
    """Find whom rows wait for, and when they arrive at the earliest; add the bad ones to `bad`."""
    linked = link_waits([row.wait for row in rows], [row.time for row in rows], skip=skip)
    bad += [why for why in linked.wrong if why]
    found = [
        row._replace(place=i, after=linked.after[i], time=linked.time_s[i], depth=linked.depth[i])
        for i, row in enumerate(rows)
        if not linked.wrong[i]
    ]
    if not found:
        raise WorkloadError(f"{name} has no usable request: {bad[0]}")
    return found


def _places(rows: Sequence[_Row]) -> IntArray:
    """Position of the row that each one waits for, `_LOST` if that is not among them."""
    if all(row.after == BY_ITSELF for row in rows):
        return np.full(len(rows), BY_ITSELF)
    place = {row.place: i for i, row in enumerate(rows)}
    return np.array([row.after if row.after < 0 else place.get(row.after, _LOST) for row in rows])


def _parse(name: str, number: int, line: int, record: Record, time_unit: TimeUnit | None) -> _Row:
    where = f"{name}, line {line}"
    # of the columns: the file, or each JSON line for itself
    holder = where if isinstance(record, str) else name
    row = columns_of(where, record)
    found = {}
    for want, names in _ALIASES.items():
        column = next((name for name in names if name in row), None)
        if column is None and want == "arrival_s" and row.get("after") not in (None, ""):
            column = want
        if column is None:
            raise WorkloadError(
                f"{holder} has no column for {want}: it has {', '.join(map(str, row))}; "
                f"needed is one of {', '.join(names)}"
            )
        found[want] = column

    def cell(column: str, low: int, high: int, default: int) -> int:
        value = row.get(column)
        return default if value in (None, "") else whole(where, column, value, low, high)

    dialect = dialect_of(found["arrival_s"], found["prompt"], row.keys())
    bailian, native, router = (dialect is kind for kind in (BAILIAN, NATIVE, ROUTER))
    wait = read_wait(where, name, number, row) if native else Wait(where, name, number)
    time = row.get(dialect.time_column)
    waits = bool(wait.after) and time in (None, "")
    e2e_s = row.get("e2e_s") if router and row.get("status") == "finished" else None
    slo_class = cell("slo_class", 0, _INT16_MAX, -1)
    return _Row(
        where=where,
        dialect=dialect,
        time=math.nan if waits else _time(where, dialect, time, time_unit),
        prompt_tokens=whole(where, found["prompt"], row[found["prompt"]], 1, _INT32_MAX),
        output_tokens=whole(where, found["output"], row[found["output"]], 1, _INT32_MAX),
        slo_class=None if slo_class < 0 else slo_class,
        tenant=cell("tenant", 0, _INT32_MAX, 0),
        session=cell("session", -1, _INT32_MAX, -1),
        hashes=_hashes(where, "hash_ids" if "hash_ids" in row else "prefix_hashes", row),
        chat=cell("chat_id", 0, _INT32_MAX, -1) if bailian else -1,
        parent_chat=cell("parent_chat_id", -1, _INT32_MAX, -1) if bailian else -1,
        wait=wait,
        key=str(row.get("key")) if router else "",
        e2e_s=math.nan if e2e_s is None else finite(where, "e2e_s", e2e_s),
        followed=parse_followed(where, row.get("follows")) if router else None,
    )


def _time(where: str, dialect: Dialect, value: object, time_unit: TimeUnit | None) -> float:
    if dialect is not AZURE or time_unit is not None:
        return finite(where, dialect.time_column, value)
    text = str(value)
    try:
        # dates alone are numbers at times, and put all requests of a day at one instant
        if ":" not in text:
            raise ValueError
        time = datetime.fromisoformat(text)
    except ValueError:
        raise WorkloadError(
            f"{where}, column TIMESTAMP: {value!r} is no time such as 2023-11-16 18:15:46.68"
        ) from None
    # without an offset, UTC: the clock of this machine has no part in a trace
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _hashes(where: str, column: str, record: dict[str, object]) -> list[int]:
    value = record.get(column)
    parts = value.split() if isinstance(value, str) else [] if value is None else value
    try:
        if not isinstance(parts, list):
            raise ValueError
        hashes = [int(str(part)) for part in parts]
        if not all(-(2**63) <= part < 2**64 for part in hashes):
            raise ValueError
    except ValueError:
        raise WorkloadError(
            f"{where}, column {column}: {value!r} is no list of whole numbers of 64 bits"
        ) from None
    return hashes


def _one_dialect(rows: list[_Row]) -> Dialect:
    first = rows[0]
    for row in rows:
        if row.dialect != first.dialect:
            raise WorkloadError(
                f"{row.where} has the columns of another kind of trace than {first.where}: give"
                " files of one kind, one at a time"
            )
    return first.dialect


def _links(rows: list[_Row], arrival_s: FloatArray) -> Links | None:
    """Who follows whom in a router's log; None where it does not say."""
    followed = [row.followed for row in rows]
    if not any(followed):
        return None
    end_s = arrival_s + np.array([row.e2e_s for row in rows])
    return link_followed([row.key for row in rows], arrival_s, end_s, followed)


def _sessions(rows: list[_Row]) -> list[int]:
    """Conversation of each request: the file's, or the first chat of those that follow it."""
    parent = {row.chat: row.parent_chat for row in rows if row.chat >= 0}
    first: dict[int, int] = {}
    for chat in parent:
        way, at = [], chat
        while at not in first and parent.get(at, -1) >= 0:
            way.append(at)
            if len(way) > len(parent):
                raise WorkloadError(f"chat {chat} follows itself: parent_chat_id goes in a circle")
            at = parent[at]
        first.update(dict.fromkeys([*way, at], first.get(at, at)))
    return [row.session if row.session >= 0 or row.chat < 0 else first[row.chat] for row in rows]


def prefix_segments(
    hashes: Sequence[Sequence[int]], block_tokens: int = BLOCK_TOKENS
) -> tuple[IntArray, Int32Array, IntArray]:
    """Chain block hashes into prefix keys: each key depends on all hashes up to its own.

    Args:
        hashes: Of the blocks of each request's prompt.
        block_tokens: Tokens of a block.

    Returns:
        `prefix_keys`, `prefix_ends` and `prefix_offsets` of a `RequestTable`.
    """
    counts = np.array([len(row) for row in hashes], np.int64)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    mixed = _mix(np.array([value % 2**64 for row in hashes for value in row], np.uint64))
    keys = np.zeros(len(mixed), np.uint64)
    ends = np.zeros(len(mixed), np.int32)
    key = np.zeros(len(hashes), np.uint64)
    for block in range(int(counts.max())):  # the blocks of one depth of all requests at once
        rows = np.flatnonzero(counts > block)
        at = offsets[rows] + block
        key[rows] = _mix(key[rows] ^ mixed[at])
        keys[at] = key[rows]
        ends[at] = (block + 1) * block_tokens
    return (keys >> np.uint64(1)).astype(np.int64), ends, offsets


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble `uint64[n]`, one to one (splitmix64; Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
