"""Trace readers: Azure, Mooncake, BurstGPT and the native format; every bad row is named."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import Int32Array, IntArray
from servegym.workloads.records import READABLE, json_object, records
from servegym.workloads.table import RequestTable

_BLOCK_TOKENS = 512  # of Mooncake's hash ids
_INT16_MAX = 2**15 - 1
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


@dataclass(frozen=True)
class Trace:
    """A request stream read from a file.

    Attributes:
        table: The requests, arrivals shifted to start at 0 and sorted.
        name: File name.
        num_skipped: Rows left out with `on_bad_row="skip"`.
        first_bad: What was wrong with the first of them, or "".
    """

    table: RequestTable
    name: str
    num_skipped: int = 0
    first_bad: str = ""


class _Row(NamedTuple):
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: int
    tenant: int
    session: int
    hashes: list[int]


def read_trace(path: str | Path, *, on_bad_row: OnBadRow = "error") -> Trace:
    """Read a trace in any supported format, told by its columns.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`, the first two also gzipped; or a folder of such
            files that go on from one another, as a router's log does.
        on_bad_row: Refuse the file at the first malformed row, or count and leave out.

    Returns:
        The trace.

    Raises:
        WorkloadError: If the file or a row cannot be used; it names file, line and column.
    """
    path = Path(path)
    rows: list[_Row] = []
    bad: list[str] = []
    for file in _files(path):
        for line, record in records(file):
            try:
                rows.append(_parse(file.name, line, record))
            except WorkloadError as error:
                if on_bad_row == "error":
                    raise
                bad.append(str(error))
    if not rows:
        raise WorkloadError(f"{path.name} has no usable request" + (f": {bad[0]}" if bad else ""))
    rows.sort(key=lambda row: row.arrival_s)
    keys, ends, offsets = prefix_segments([row.hashes for row in rows])
    arrival = np.array([row.arrival_s for row in rows])
    table = RequestTable.build(
        arrival - arrival[0],
        np.array([row.prompt_tokens for row in rows]),
        np.array([row.output_tokens for row in rows]),
        slo_class=np.array([row.slo_class for row in rows]),
        tenant=np.array([row.tenant for row in rows]),
        session=np.array([row.session for row in rows]),
        prefix_offsets=offsets,
        prefix_keys=keys,
        prefix_ends=ends,
    )
    return Trace(table, path.name, len(bad), bad[0] if bad else "")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.lower().endswith(READABLE))


def _parse(name: str, line: int, record: str | dict[str, object]) -> _Row:
    where = f"{name}, line {line}"
    holder = name  # of the columns: the file, or each JSON line for itself
    if isinstance(record, str):
        record, holder = json_object(where, record), where
    found = {}
    for want, names in _ALIASES.items():
        column = next((name for name in names if name in record), None)
        if column is None:
            raise WorkloadError(
                f"{holder} has no column for {want}: it has {', '.join(map(str, record))}; "
                f"needed is one of {', '.join(names)}"
            )
        found[want] = column

    def whole(column: str, low: int, high: int, default: int | None = None) -> int:
        value = record.get(column)
        if default is not None and value in (None, ""):
            return default
        return _whole(where, column, value, low, high)

    return _Row(
        arrival_s=_time(where, found["arrival_s"], record[found["arrival_s"]]),
        prompt_tokens=whole(found["prompt"], 1, _INT32_MAX),
        output_tokens=whole(found["output"], 1, _INT32_MAX),
        slo_class=whole("slo_class", 0, _INT16_MAX, default=0),
        tenant=whole("tenant", 0, _INT32_MAX, default=0),
        session=whole("session", -1, _INT32_MAX, default=-1),
        hashes=_hashes(where, "hash_ids" if "hash_ids" in record else "prefix_hashes", record),
    )


def _time(where: str, column: str, value: object) -> float:
    if column == "TIMESTAMP":
        try:
            time = datetime.fromisoformat(str(value))
        except ValueError:
            raise WorkloadError(
                f"{where}, column {column}: {value!r} is no time such as 2023-11-16 18:15:46.68"
            ) from None
        # without an offset, UTC: the clock of this machine has no part in a trace
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    seconds = _number(where, column, value)
    if not np.isfinite(seconds):
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a finite time")
    return seconds / 1000.0 if column == "timestamp" else seconds  # Mooncake counts milliseconds


def _whole(where: str, column: str, value: object, low: int, high: int) -> int:
    number = _number(where, column, value)
    if not (low <= number <= high and number == int(number)):
        raise WorkloadError(
            f"{where}, column {column}: {value!r} must be a whole number from {low} to {high}"
        )
    return int(number)


def _number(where: str, column: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a number") from None


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


def prefix_segments(hashes: list[list[int]]) -> tuple[IntArray, Int32Array, IntArray]:
    """Chain block hashes into prefix keys: each key depends on all hashes up to its own.

    Args:
        hashes: Of the blocks of each request's prompt.

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
        ends[at] = (block + 1) * _BLOCK_TOKENS
    return (keys >> np.uint64(1)).astype(np.int64), ends, offsets


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble `uint64[n]`, one to one (splitmix64; Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
