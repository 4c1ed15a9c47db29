"""Trace readers: Azure, Mooncake, BurstGPT and the native format; every bad row is named."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np

from servegym.errors import WorkloadError
from servegym.workloads.table import RequestTable

_BLOCK_TOKENS = 512  # of Mooncake's hash ids
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


def read_trace(path: str | Path, *, on_bad_row: Literal["error", "skip"] = "error") -> Trace:
    """Read a trace in any supported format, told by its columns.

    Args:
        path: `.csv`, `.jsonl` or `.parquet`, the first two also gzipped.
        on_bad_row: Refuse the file at the first malformed row, or count and leave out.

    Returns:
        The trace.

    Raises:
        WorkloadError: If the file or a row cannot be used; it names file, line and column.
    """
    path = Path(path)
    if not path.is_file():
        raise WorkloadError(f"no trace at {path}: give the path of a CSV, JSONL or Parquet file")
    rows: list[tuple[float, int, int, list[int], int, int, int]] = []
    bad: list[str] = []
    for line, record in _records(path):
        try:
            rows.append(_parse(path, line, record))
        except WorkloadError as error:
            if on_bad_row == "error":
                raise
            bad.append(str(error))
    if not rows:
        raise WorkloadError(f"{path.name} has no usable request" + (f": {bad[0]}" if bad else ""))
    rows.sort(key=lambda row: row[0])
    hashes = [row[3] for row in rows]
    keys, ends, offsets = _segments(hashes)
    arrival = np.array([row[0] for row in rows])
    table = RequestTable.build(
        arrival - arrival[0],
        np.array([row[1] for row in rows]),
        np.array([row[2] for row in rows]),
        slo_class=np.array([row[4] for row in rows]),
        tenant=np.array([row[5] for row in rows]),
        session=np.array([row[6] for row in rows]),
        prefix_offsets=offsets,
        prefix_keys=keys,
        prefix_ends=ends,
    )
    return Trace(table, path.name, len(bad), bad[0] if bad else "")


def _records(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield `(line, record)`; the header of a CSV is line 1."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise WorkloadError(
                "reading Parquet needs pyarrow: pip install 'servegym[parquet]'"
            ) from error
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="") as raw:
        stream = io.StringIO(raw.read())
    if ".jsonl" in path.name:
        for line, text in enumerate(stream, start=1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except json.JSONDecodeError as error:
                    raise WorkloadError(
                        f"{path.name}, line {line}: not JSON ({error.msg})"
                    ) from error
        return
    import csv

    for line, record in enumerate(csv.DictReader(stream), start=2):
        yield line, dict(record)


def _parse(
    path: Path, line: int, record: dict[str, object]
) -> tuple[float, int, int, list[int], int, int, int]:
    where = f"{path.name}, line {line}"
    found = {}
    for want, names in _ALIASES.items():
        column = next((name for name in names if name in record), None)
        if column is None:
            raise WorkloadError(
                f"{path.name} has no column for {want}: it has {', '.join(map(str, record))}; "
                f"needed is one of {', '.join(names)}"
            )
        found[want] = column
    arrival = _time(where, found["arrival_s"], record)
    prompt = _count(where, found["prompt"], record[found["prompt"]])
    output = _count(where, found["output"], record[found["output"]])
    raw = record.get("hash_ids", record.get("prefix_hashes"))
    hashes: list[int] = []
    if isinstance(raw, str):
        hashes = [int(part) for part in raw.split()]
    elif raw is not None:
        hashes = [int(part) for part in raw]  # type: ignore[attr-defined]
    extra = [
        int(float(str(record.get(name) or default)))
        for name, default in (("slo_class", 0), ("tenant", 0), ("session", -1))
    ]
    return arrival, prompt, output, hashes, extra[0], extra[1], extra[2]


def _time(where: str, column: str, record: dict[str, object]) -> float:
    value = record[column]
    if column == "TIMESTAMP":
        try:
            return datetime.fromisoformat(str(value)[:26].rstrip("Z")).timestamp()
        except ValueError:
            raise WorkloadError(
                f"{where}, column {column}: {value!r} is no time such as 2023-11-16 18:15:46.68"
            ) from None
    try:
        seconds = float(str(value))
    except ValueError:
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a number") from None
    if not np.isfinite(seconds):
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a finite time")
    return seconds / 1000.0 if column == "timestamp" else seconds  # Mooncake counts milliseconds


def _count(where: str, column: str, value: object) -> int:
    try:
        number = float(str(value))
    except ValueError:
        raise WorkloadError(f"{where}, column {column}: {value!r} is not a number") from None
    if not (number >= 1 and number == int(number)):
        raise WorkloadError(f"{where}, column {column}: {value!r} must be a whole number from 1 on")
    return int(number)


def _segments(hashes: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chain block hashes into prefix keys: each key depends on all hashes up to its own."""
    keys: list[int] = []
    ends: list[int] = []
    offsets = [0]
    for row in hashes:
        key = 0
        for block, value in enumerate(row, start=1):
            key = hash((key, value)) & 0x7FFFFFFFFFFFFFFF
            keys.append(key)
            ends.append(block * _BLOCK_TOKENS)
        offsets.append(len(keys))
    return np.array(keys, np.int64), np.array(ends, np.int32), np.array(offsets, np.int64)
