"""Files of the decision log: they rotate, and hold whole rows whatever the disk does."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from servegym.errors import ConfigError

Row = dict[str, Any]
#: Bytes of lines that are written at once.
_CHUNK_BYTES = 65536
_STAMP = re.compile(r"requests-(\d{8}T\d{6}Z)-")


class LogFiles(Protocol):
    """Where rows go; what fails drops what it was to write, and the next goes to a new file."""

    def write(self, row: Row) -> int:
        """Take a row; return how many have been written with it.

        Raises:
            WriteError: If some cannot be.
        """

    def flush(self) -> int:
        """Write what can be read at once; return how many rows have been."""

    def close(self) -> int:
        """Write everything and close the file; return how many rows have been written."""


class WriteError(Exception):
    """Rows could not be written.

    Attributes:
        num_rows: So many are lost.
    """

    def __init__(self, num_rows: int, reason: str) -> None:
        super().__init__(reason)
        self.num_rows = num_rows


class _Rotation:
    """Names files by the time they were begun, and deletes the oldest."""

    def __init__(self, folder: Path, suffix: str, max_files: int) -> None:
        self._folder, self._suffix, self._max_files = folder, suffix, max_files
        self._number = 0

    def next_path(self) -> Path:
        self._number += 1
        there = sorted(self._folder.glob(f"requests-*{self._suffix}"))
        for old in there[: max(0, len(there) - self._max_files + 1)]:
            old.unlink(missing_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        if there and (last := _STAMP.match(there[-1].name)):
            stamp = max(stamp, last[1])  # the newest stays the last where the clock was set back
        name = f"requests-{stamp}-{os.getpid()}-{self._number:05d}{self._suffix}"
        return self._folder / name


class Jsonl:
    """One JSON object a line.

    A line that a full disk cuts short is taken back, so that every line can be read.

    Args:
        folder: Of the files.
        max_file_rows: After so many rows the next file is begun.
        max_files: The oldest are deleted beyond so many.
    """

    def __init__(self, folder: Path, max_file_rows: int, max_files: int) -> None:
        self._rotation = _Rotation(folder, ".jsonl", max_files)
        self._max_file_rows = max_file_rows
        self._handle = -1
        self._size = self._rows = 0  # what is whole in the file
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def write(self, row: Row) -> int:
        """Take a row; see `LogFiles`."""
        try:
            line = json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise WriteError(1, str(error)) from error
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        if self._rows + len(self._waiting) >= self._max_file_rows:
            return self.close()
        return self.flush() if self._waiting_bytes >= _CHUNK_BYTES else 0

    def flush(self) -> int:
        """Write all lines that wait."""
        lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if not lines:
            return 0
        try:
            if self._handle < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                self._handle = os.open(self._rotation.next_path(), flags, 0o644)
                self._size = self._rows = 0
            self._write_all(b"".join(lines))
        except OSError as error:
            self._abandon()
            raise WriteError(len(lines), error.strerror or str(error)) from error
        self._rows += len(lines)
        return len(lines)

    def close(self) -> int:
        """Write all lines that wait, and close the file."""
        count = self.flush()
        if self._handle >= 0:
            os.close(self._handle)
        self._handle, self._rows = -1, 0
        return count

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]
        self._size += len(data)

    def _abandon(self) -> None:
        handle, self._handle, self._rows = self._handle, -1, 0
        with suppress(OSError):
            os.ftruncate(handle, self._size)
        with suppress(OSError):
            os.close(handle)


class Parquet:
    """Row groups of at most `GROUP` rows; a file is readable, and written, once it is closed.

    Args:
        folder: Of the files.
        max_file_rows: After so many rows the next file is begun.
        max_files: The oldest are deleted beyond so many.

    Raises:
        ConfigError: If pyarrow is missing.
    """

    GROUP = 1000

    def __init__(self, folder: Path, max_file_rows: int, max_files: int) -> None:
        self._rotation = _Rotation(folder, ".parquet", max_files)
        self._max_file_rows = max_file_rows
        self._pa = _pyarrow()
        self._schema = _schema(self._pa)
        self._buffer: list[Row] = []
        self._writer: Any = None
        self._part: Path | None = None
        self._rows = 0

    def write(self, row: Row) -> int:
        """Take a row; see `LogFiles`."""
        self._buffer.append(row)
        if self._rows + len(self._buffer) >= self._max_file_rows:
            return self.close()
        if len(self._buffer) >= self.GROUP:
            self._write_group()
        return 0

    def flush(self) -> int:
        """Do nothing: a row group is written when it is full."""
        return 0

    def close(self) -> int:
        """Write the last group, and give the file its name."""
        self._write_group()
        rows, writer, part = self._rows, self._writer, self._part
        if writer is None or part is None:
            return 0
        try:
            writer.close()
            os.replace(part, part.with_suffix(""))
        except OSError as error:
            raise WriteError(self._abandon(), error.strerror or str(error)) from error
        self._writer, self._part, self._rows = None, None, 0
        return rows

    def _write_group(self) -> None:
        rows, self._buffer = self._buffer, []
        if not rows:
            return
        from pyarrow import parquet

        try:
            table = self._pa.Table.from_pylist(rows, self._schema)
            if self._writer is None:
                path = self._rotation.next_path()
                self._part = path.with_name(f"{path.name}.part")
                self._writer = parquet.ParquetWriter(self._part, self._schema)
            self._writer.write_table(table)
        except (OSError, ValueError, TypeError) as error:
            raise WriteError(len(rows) + self._abandon(), str(error)) from error
        self._rows += len(rows)

    def _abandon(self) -> int:
        """Give up a file whose footer cannot be written; return how many rows were in it."""
        rows, writer, part = self._rows, self._writer, self._part
        self._writer, self._part, self._rows = None, None, 0
        with suppress(OSError):
            if writer is not None:
                writer.close()
        with suppress(OSError):
            if part is not None:
                part.unlink(missing_ok=True)
        return rows


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError("a Parquet log needs pyarrow: pip install pyarrow") from error
    return pyarrow


def _schema(pa: Any) -> Any:
    decision = pa.struct(
        [
            ("after_s", pa.float64()),
            ("action", pa.int32()),
            ("replica_name", pa.string()),
            ("by", pa.string()),
            ("reason", pa.string()),
            ("duration_s", pa.float64()),
            ("proposed", pa.int32()),
            ("propensity", pa.float64()),
            ("policy", pa.string()),
            (
                "observation",
                pa.struct(
                    [
                        ("replicas", pa.list_(pa.list_(pa.float32()))),
                        ("request", pa.list_(pa.float32())),
                        ("mask", pa.list_(pa.bool_())),
                    ]
                ),
            ),
        ]
    )
    placement = pa.struct(
        [
            ("after_s", pa.float64()),
            ("replica_name", pa.string()),
            ("by", pa.string()),
            ("reason", pa.string()),
            ("duration_s", pa.float64()),
            ("proposed", pa.string()),
        ]
    )
    followed = pa.struct([("key", pa.string()), ("delay_s", pa.float64()), ("by", pa.string())])
    return pa.schema(
        [
            ("key", pa.string()),
            ("arrival_s", pa.float64()),
            ("prompt_tokens", pa.int32()),
            ("output_tokens", pa.int32()),
            ("predicted_output_tokens", pa.float64()),
            ("cached_tokens", pa.int32()),
            ("slo_class", pa.int16()),
            ("slo_class_name", pa.string()),
            ("tenant", pa.int32()),
            ("tenant_name", pa.string()),
            ("model", pa.string()),
            ("hash_ids", pa.list_(pa.uint64())),
            ("status", pa.string()),
            ("replica", pa.int16()),
            ("replica_name", pa.string()),
            ("dispatch_s", pa.float64()),
            ("ttft_s", pa.float64()),
            ("e2e_s", pa.float64()),
            ("num_retries", pa.int16()),
            ("follows", followed),
            ("decisions", pa.list_(decision)),
            ("prefill_replica_name", pa.string()),
            ("prefilled_s", pa.float64()),
            ("placements", pa.list_(placement)),
        ]
    )
