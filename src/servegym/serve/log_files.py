"""Files of the decision log: what has been written stays readable, whatever fails after it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from servegym.errors import ConfigError

Row = dict[str, Any]
#: Lines are written at once when they are so many bytes.
_BATCH_BYTES = 64 * 1024
_STAMP = re.compile(r"requests-(\d{8}T\d{6}Z)-")


class _Rotation:
    """Names files by the time they were begun, and deletes the oldest."""

    def __init__(self, folder: Path, max_files: int, suffix: str) -> None:
        self._folder, self._max_files, self._suffix = folder, max_files, suffix
        self._number = 0

    def next_path(self) -> Path:
        mine = sorted(self._folder.glob(f"requests-*{self._suffix}"))
        for old in mine[: max(0, len(mine) - self._max_files + 1)]:
            old.unlink(missing_ok=True)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        if mine and (last := _STAMP.match(mine[-1].name)):
            stamp = max(stamp, last[1])  # the newest stays the last where the clock was set back
        name = f"requests-{stamp}-{os.getpid()}-{self._number + 1:05d}{self._suffix}"
        self._number += 1
        return self._folder / name


class Jsonl:
    """One JSON object a line.

    Args:
        folder: Files go here.
        max_file_rows: Of a file.
        max_files: The oldest go beyond so many.

    Attributes:
        num_written: Rows in files.
        num_lost: Rows that were in files and are no more: none here.
    """

    def __init__(self, folder: Path, max_file_rows: int, max_files: int) -> None:
        self.num_written = 0
        self.num_lost = 0
        self._rotation = _Rotation(folder, max_files, ".jsonl")
        self._max_file_rows = max_file_rows
        self._lines: deque[bytes] = deque()
        self._bytes = 0  # of the lines
        self._at = 0  # bytes of the first of them that are in the file
        self._file: Any = None
        self._rows = 0  # in the file

    @property
    def num_waiting(self) -> int:
        """Rows that are not in a file."""
        return len(self._lines)

    @property
    def is_due(self) -> bool:
        """Whether so many rows wait that they should be written."""
        return self._bytes >= _BATCH_BYTES

    def add(self, row: Row) -> None:
        """Take a row, to be written with the next `flush`.

        Raises:
            ValueError: If JSON has no form for it; or `TypeError`.
        """
        line = json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        self._lines.append(line)
        self._bytes += len(line)

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: If it cannot be written, or not all of it; another call goes on there.
        """
        while self._lines:
            if self._file is None:
                self._file = self._rotation.next_path().open("wb", buffering=0)
                self._rows = 0
            room = self._max_file_rows - self._rows
            data = memoryview(b"".join(itertools.islice(self._lines, room)))
            at = self._at
            try:
                while at < len(data):
                    at += self._file.write(data[at:])
            finally:
                self._forget(at)
            if self._rows >= self._max_file_rows:
                self._end()

    def close(self) -> None:
        """Write what waits, and close the file.

        Raises:
            OSError: See `flush`.
        """
        try:
            self.flush()
        finally:
            self._end()

    def _forget(self, at: int) -> None:
        """So many bytes are in the file."""
        while self._lines and at >= len(self._lines[0]):
            size = len(self._lines.popleft())
            at -= size
            self._bytes -= size
            self._rows += 1
            self.num_written += 1
        self._at = at

    def _end(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            if self._at:  # what could not be ended would make the file unreadable
                with contextlib.suppress(OSError):
                    file.truncate(file.seek(0, os.SEEK_END) - self._at)
                self._at = 0
            file.close()


class Parquet:
    """Row groups of at most `GROUP` rows; a file is readable once it is closed.

    A file that a group does not fit on the disk is lost with the groups it has: its end, without
    which it cannot be read, would not fit, either.

    Args:
        folder: Files go here.
        max_file_rows: Of a file.
        max_files: The oldest go beyond so many.

    Attributes:
        num_written: Rows in files.
        num_lost: Rows of files that were lost.

    Raises:
        ConfigError: If pyarrow is missing.
    """

    GROUP = 1000

    def __init__(self, folder: Path, max_file_rows: int, max_files: int) -> None:
        self.num_written = 0
        self.num_lost = 0
        self._rotation = _Rotation(folder, max_files, ".parquet")
        self._max_file_rows = max_file_rows
        self._pa = _pyarrow()
        self._schema = _schema(self._pa)
        self._buffer: list[Row] = []
        self._writer: Any = None
        self._part: Path | None = None
        self._rows = 0  # in the file

    @property
    def num_waiting(self) -> int:
        """Rows that are not in a file."""
        return len(self._buffer)

    @property
    def is_due(self) -> bool:
        """Whether so many rows wait that they should be written."""
        return len(self._buffer) >= min(self.GROUP, self._max_file_rows - self._rows)

    def add(self, row: Row) -> None:
        """Take a row, to be written with its group."""
        self._buffer.append(row)

    def flush(self) -> None:
        """Write the groups that are whole.

        Raises:
            OSError: If one cannot be written; its rows wait on.
        """
        if self.is_due:
            self._write_group()
            if self._rows >= self._max_file_rows:
                self._end()

    def close(self) -> None:
        """Write what waits, and end the file.

        Raises:
            OSError: See `flush`.
        """
        if self._buffer:
            self._write_group()
        self._end()

    def _write_group(self) -> None:
        from pyarrow import parquet

        table = self._pa.Table.from_pylist(self._buffer, self._schema)
        try:
            if self._writer is None:
                path = self._rotation.next_path()
                self._part = path.with_name(f"{path.name}.part")
                self._writer = parquet.ParquetWriter(self._part, self._schema)
            self._writer.write_table(table)
        except OSError:
            self._give_up()
            raise
        self._rows += len(self._buffer)
        self.num_written += len(self._buffer)
        self._buffer = []

    def _end(self) -> None:
        if self._writer is None:
            return
        assert self._part is not None
        try:
            self._writer.close()
            os.replace(self._part, self._part.with_suffix(""))
        except OSError:
            self._give_up()
            raise
        self._writer, self._rows = None, 0

    def _give_up(self) -> None:
        """Lose the file, which also makes room."""
        self.num_lost += self._rows
        self.num_written -= self._rows
        with contextlib.suppress(OSError):
            if self._writer is not None:
                self._writer.close()
        with contextlib.suppress(OSError):
            if self._part is not None:
                self._part.unlink(missing_ok=True)
        self._writer, self._part, self._rows = None, None, 0


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
