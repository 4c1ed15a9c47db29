"""Trace files as records: CSV, JSON lines and Parquet, with the line of each."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from servegym.documents import load_json
from servegym.errors import WorkloadError

READABLE = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


class Ragged(NamedTuple):
    """A CSV row with more or fewer fields than the header: nobody knows which column is which."""

    num_fields: int
    num_columns: int


#: A row as it stands in the file: one bad row is no bad file, so `columns_of` judges it.
Record = str | dict[str, object] | Ragged


def records(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield every record of a trace file with its line; the header of a CSV is line 1.

    A record is a dictionary by column where that is sure. The text of a JSON line, and a CSV row
    whose fields do not match the header, are for `columns_of` to read or refuse.

    Raises:
        WorkloadError: If the file is of no known kind, damaged, not what its name says, or has
            two columns of one name.
    """
    name = path.name.lower()
    if not path.is_file():
        raise WorkloadError(f"no trace at {path}: give the path of a CSV, JSONL or Parquet file")
    if not name.endswith(READABLE):
        raise WorkloadError(f"cannot read {path.name}: a trace is one of {', '.join(READABLE)}")
    if name.endswith(".parquet"):
        yield from enumerate(_parquet(path), start=1)
        return
    text = _text(path)
    if ".jsonl" in name:
        lines = enumerate(io.StringIO(text), start=1)
        yield from ((line, row) for line, row in lines if row.strip())
        return
    yield from csv_records(path.name, text)


def csv_records(name: str, text: str) -> Iterator[tuple[int, dict[str, object] | Ragged]]:
    """Yield the rows of a CSV text with their lines; empty lines are none.

    Args:
        name: Of the file, for messages.
        text: With line ends of one kind.

    Raises:
        WorkloadError: If a quote is not closed, or the header names a column twice.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        rows = (row for row in reader if len(row) > 1 or "".join(row).strip())
        header = [column.strip() for column in next(rows, [])]
        _require_distinct(name, header)
        for row in rows:
            if len(row) == len(header):
                yield reader.line_num, dict(zip(header, row, strict=True))
            else:
                yield reader.line_num, Ragged(len(row), len(header))
    except csv.Error as error:
        raise WorkloadError(f"{name}, line {reader.line_num}: no CSV ({error})") from error


def columns_of(where: str, record: Record) -> dict[str, object]:
    """Return a record by column; `where` names it in errors.

    Raises:
        WorkloadError: If it is a JSON line that is no object or has a key twice, or a CSV row with
            more or fewer fields than the header.
    """
    if isinstance(record, dict):
        return record
    if isinstance(record, Ragged):
        raise WorkloadError(
            f"{where}: {record.num_fields} fields, but the header has {record.num_columns} columns:"
            " quote fields that contain commas"
        )
    try:
        found = load_json(record)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise WorkloadError(f"{where}: must be an object with a key for each column")
    return found


def file_text(path: Path) -> str:
    """Read a text file, gzipped or not, without a byte order mark and with one kind of line ends.

    Raises:
        OSError, EOFError, zlib.error: If it cannot be read.
        UnicodeDecodeError: If it is not UTF-8.
    """
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    # utf-8-sig: spreadsheets put a byte order mark before the first column's name
    with opener(path, "rt", encoding="utf-8-sig") as file:
        return str(file.read())


def _text(path: Path) -> str:
    try:
        return file_text(path)
    except UnicodeDecodeError as error:
        raise WorkloadError(f"cannot read {path.name}: it is not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"cannot read {path.name}: {error}") from error


def _require_distinct(name: str, columns: list[str]) -> None:
    for column, count in Counter(columns).items():
        # columns without a name, as after a comma too many, are of no use and do no harm
        if column and count > 1:
            raise WorkloadError(
                f"{name} has {count} columns {column!r}: name each column once, as it is not known"
                " which of them counts"
            )


def _parquet(path: Path) -> list[dict[str, object]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise WorkloadError("reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        with parquet.ParquetFile(path) as file:
            _require_distinct(path.name, file.schema_arrow.names)
            return list(file.read().to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise WorkloadError(f"cannot read {path.name}: it is no Parquet file") from error
