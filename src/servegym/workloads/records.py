"""Trace files as records: CSV, JSON lines and Parquet, with the line of each."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from servegym.errors import WorkloadError

READABLE = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


def records(path: Path) -> Iterator[tuple[int, str | dict[str, object]]]:
    """Yield every record of a trace file with its line; the header of a CSV is line 1.

    A record is a dictionary by column. That of a JSON line is still its text, for `json_object`
    to read: a broken line is one bad row, not a bad file.

    Raises:
        WorkloadError: If the file is of no known kind, damaged or not what its name says.
    """
    name = path.name.lower()
    if not path.is_file():
        raise WorkloadError(f"no trace at {path}: give the path of a CSV, JSONL or Parquet file")
    if not name.endswith(READABLE):
        raise WorkloadError(f"cannot read {path.name}: a trace is one of {', '.join(READABLE)}")
    if name.endswith(".parquet"):
        yield from enumerate(_parquet(path), start=1)
        return
    stream = io.StringIO(_text(path))
    if ".jsonl" in name:
        yield from ((line, text) for line, text in enumerate(stream, start=1) if text.strip())
        return
    reader = csv.DictReader(stream)
    try:
        for record in reader:
            yield reader.line_num, record
    except csv.Error as error:
        raise WorkloadError(f"{path.name}, line {reader.line_num}: no CSV ({error})") from error


def json_object(where: str, text: str) -> dict[str, object]:
    """Read one JSON line; `where` names it in errors.

    Raises:
        WorkloadError: If it is not JSON, or no object.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise WorkloadError(f"{where}: must be an object with a key for each column")
    return record


def _text(path: Path) -> str:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            return str(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"cannot read {path.name}: {error}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"cannot read {path.name}: it is not UTF-8 text") from error


def _parquet(path: Path) -> list[dict[str, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise WorkloadError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        return list(parquet.read_table(path).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise WorkloadError(f"cannot read {path.name}: it is no Parquet file") from error
