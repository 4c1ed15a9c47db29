"""The decision log: every request, how it was decided and how it went, readable as a trace.

One row a request, written when it ends, in files that rotate. The columns are those of the native
trace format (`workloads.readers`) and more; `docs/live.md` lists them. A thread writes; when it
cannot keep up, rows are dropped and counted, and serving goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from servegym.cluster import state as s
from servegym.cluster.outcome import EVENT_DTYPE
from servegym.errors import ConfigError, WorkloadError
from servegym.workloads.records import columns_of, records

_log = logging.getLogger(__name__)

Row = dict[str, Any]
#: Tokens of a block of the trace format's hash ids.
TRACE_BLOCK_TOKENS = 512
#: Actions of the log that are no replica: unlike a mask's, they do not depend on the fleet's size.
LOGGED_HOLD, LOGGED_REJECT = -1, -2
#: Seconds that a row may wait in memory before it is flushed.
_FLUSH_S = 1.0


def logged_action(action: int, num_replicas: int) -> int:
    """Return an index into the mask of so many replicas as the log has it."""
    return action if action < num_replicas else num_replicas + LOGGED_HOLD - action


def mask_action(logged: int, num_replicas: int) -> int:
    """Return an action of the log as an index into the mask of so many replicas."""
    return logged if logged >= 0 else num_replicas + LOGGED_HOLD - logged


class DecisionLogConfig(BaseModel):
    """Where and how much.

    Attributes:
        folder: Files go here.
        format: `jsonl`, or `parquet` (needs pyarrow).
        max_file_rows: A file is closed and the next begun after so many requests.
        max_files: The oldest files are deleted beyond so many.
        max_queue: Rows that wait to be written at most.
        observations: Keep what each decision saw: some kilobytes a decision.
        max_ends: Answered requests that are remembered at most, so that rows can say which of them
            they follow; 0: no row says it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    format: Literal["jsonl", "parquet"] = "jsonl"
    max_file_rows: int = Field(100_000, ge=1)
    max_files: int = Field(100, ge=1)
    max_queue: int = Field(10_000, ge=1)
    observations: bool = False
    max_ends: int = Field(20_000, ge=0)


class DecisionLog:
    """Writes rows in a thread of its own.

    Args:
        config: Where to.

    Attributes:
        num_written: Rows that are on disk, or with the operating system.
        num_dropped: Rows that found the queue full, or could not be written.

    Raises:
        ConfigError: If the folder cannot be written, or pyarrow is missing.
    """

    def __init__(self, config: DecisionLogConfig) -> None:
        self.config = config
        self.num_written = 0
        self.num_dropped = 0
        try:
            config.folder.mkdir(parents=True, exist_ok=True)
            usable = os.access(config.folder, os.W_OK)
        except OSError:
            usable = False
        if not usable:
            raise ConfigError(f"{config.folder} cannot be written: give a folder for the log")
        if config.format == "parquet":
            _pyarrow()
        self._queue: queue.Queue[Row | None] = queue.Queue(config.max_queue)
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Hand a row over; never waits."""
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self.num_dropped += 1

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is waiting and close the file."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=timeout_s)
            except queue.Full:
                return
            self._thread.join(timeout_s)

    def _run(self) -> None:
        writer = _Jsonl(self.config) if self.config.format == "jsonl" else _Parquet(self.config)
        while True:
            try:
                row = self._queue.get(timeout=_FLUSH_S)
            except queue.Empty:
                self._guard(writer.flush, 0)
                continue
            if row is None:
                self._guard(writer.close, 0)
                return
            if self._guard(lambda row=row: writer.write(row), 1):
                self.num_written += 1

    def _guard(self, action: Any, rows: int) -> bool:
        """Do it; a full disk costs rows, not the service."""
        try:
            action()
        except (OSError, ValueError, TypeError) as error:
            self.num_dropped += rows
            _log.error("the decision log cannot be written: %s", error)
            return False
        return True


class _Rotation:
    """Names files by the time they were begun, and deletes the oldest."""

    def __init__(self, config: DecisionLogConfig, suffix: str) -> None:
        self.config, self.suffix = config, suffix
        self._number = 0

    def next_path(self) -> Path:
        self._number += 1
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"requests-{stamp}-{os.getpid()}-{self._number:05d}{self.suffix}"
        mine = sorted(self.config.folder.glob(f"requests-*{self.suffix}"))
        for old in mine[: max(0, len(mine) - self.config.max_files + 1)]:
            old.unlink(missing_ok=True)
        return self.config.folder / name


class _Jsonl:
    """One JSON object a line."""

    def __init__(self, config: DecisionLogConfig) -> None:
        self._rotation = _Rotation(config, ".jsonl")
        self._file: Any = None
        self._rows = 0

    def write(self, row: Row) -> None:
        line = json.dumps(row, separators=(",", ":"), allow_nan=False)
        if self._file is None:
            self._file = self._rotation.next_path().open("w", encoding="utf-8")
            self._rows = 0
        self._file.write(line + "\n")
        self._rows += 1
        if self._rows >= self._rotation.config.max_file_rows:
            self.close()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class _Parquet:
    """Row groups of at most `GROUP` rows; a file is readable once it is closed."""

    GROUP = 1000

    def __init__(self, config: DecisionLogConfig) -> None:
        self._rotation = _Rotation(config, ".parquet")
        self._pa = _pyarrow()
        self._schema = _schema(self._pa)
        self._buffer: list[Row] = []
        self._writer: Any = None
        self._part: Path | None = None
        self._rows = 0

    def write(self, row: Row) -> None:
        self._buffer.append(row)
        if len(self._buffer) >= self.GROUP:
            self._write_group()
        if self._rows + len(self._buffer) >= self._rotation.config.max_file_rows:
            self.close()

    def flush(self) -> None:
        """Do nothing: a row group is written when it is full."""

    def close(self) -> None:
        self._write_group()
        if self._writer is not None:
            self._writer.close()
            assert self._part is not None
            os.replace(self._part, self._part.with_suffix(""))
        self._writer, self._rows = None, 0

    def _write_group(self) -> None:
        rows, self._buffer = self._buffer, []
        if not rows:
            return
        from pyarrow import parquet

        if self._writer is None:
            path = self._rotation.next_path()
            self._part = path.with_name(f"{path.name}.part")
            self._writer = parquet.ParquetWriter(self._part, self._schema)
        self._writer.write_table(self._pa.Table.from_pylist(rows, self._schema))
        self._rows += len(rows)


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


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of one file of the log, or of all files of a folder in order.

    Raises:
        WorkloadError: If a file is no such log.
    """
    files = [path]
    if path.is_dir():
        files = sorted([*path.glob("requests-*.jsonl"), *path.glob("requests-*.parquet")])
    for file in files:
        for line, record in records(file):
            where = f"{file.name}, line {line}"
            row = columns_of(where, record)
            if "decisions" not in row:
                raise WorkloadError(f"{where} is no row of a decision log: it has no decisions")
            yield row


def read_events(path: Path) -> NDArray[np.void]:
    """Read a log as an event log, in the simulator's form.

    Requests are numbered in order of arrival, as `workloads.readers.read_trace` numbers them, and
    times count from the first arrival. Replicas have the numbers that the log counts them by. Where
    the fleet has changed these name now one, now another: then names are numbered, in order of
    their first requests.

    Args:
        path: A file of the log, or its folder.

    Returns:
        `cluster.outcome.EVENT_DTYPE[m]`, in order of time. A retry is a return.

    Raises:
        WorkloadError: If there is no row.
    """
    rows = sorted(read_rows(path), key=lambda row: row["arrival_s"])
    if not rows:
        raise WorkloadError(f"{path} has no request")
    zero_s = rows[0]["arrival_s"]
    numbers = _numbers(rows)
    events: list[tuple[float, float, int, int, int]] = []
    for i, row in enumerate(rows):
        at_s = row["arrival_s"] - zero_s
        events.append((at_s, 0.0, i, -1, s.EV_ARRIVE))
        place = -1
        for decision in row["decisions"]:
            time_s, action = at_s + decision["after_s"], decision["action"]
            if place >= 0:
                events.append((time_s, 0.0, i, place, s.EV_RETURN))
            place = numbers.get(decision.get("replica_name"), action) if action >= 0 else -1
            kind = {LOGGED_HOLD: s.EV_HOLD, LOGGED_REJECT: s.EV_REJECT}.get(action, s.EV_DISPATCH)
            events.append((time_s, 0.0, i, place, kind))
        for placement in row.get("placements") or ():
            place = numbers[placement["replica_name"]]
            events.append((at_s + placement["after_s"], 0.0, i, place, s.EV_PLACE))
        if (prefilled_s := row.get("prefilled_s")) is not None:
            source = numbers[row["prefill_replica_name"]]
            events.append((at_s + prefilled_s, 0.0, i, source, s.EV_PREFILLED))
        if row["ttft_s"] is not None:
            events.append((at_s + row["ttft_s"], 0.0, i, place, s.EV_FIRST_TOKEN))
        if row["status"] == "finished":
            events.append((at_s + row["e2e_s"], 0.0, i, place, s.EV_FINISH))
    events.sort(key=lambda event: event[0])
    return np.array(events, EVENT_DTYPE)


def _numbers(rows: list[Row]) -> dict[str, int]:
    """Number the replicas of a log by name, if they cannot go by what they are counted by."""
    named = dict.fromkeys(  # in order of time
        (str(decision["replica_name"]), int(decision["action"]))
        for row in rows
        for decision in row["decisions"]
        if decision.get("replica_name") is not None
    )
    placed = dict.fromkeys(  # where they decode that were prefilled elsewhere
        str(placement["replica_name"]) for row in rows for placement in row.get("placements") or ()
    )
    names = list(dict.fromkeys([*(name for name, _ in named), *placed]))
    counted = {action for _, action in named}
    if len(names) == len(counted) == len(named):
        return dict(named)
    return {name: number for number, name in enumerate(names)}


def finite(value: float) -> float | None:
    """Return a number that JSON knows, `None` for the others."""
    return value if math.isfinite(value) else None
