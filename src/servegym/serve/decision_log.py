"""The decision log: every request, how it was decided and how it went, readable as a trace.

One row a request, written when it ends, in files that rotate. The columns are those of the native
trace format (`workloads.readers`) and more; `docs/live.md` lists them. A thread writes, by
`log_files`; when it cannot keep up, rows are dropped and counted, and serving goes on.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from servegym.cluster import state as s
from servegym.cluster.outcome import EVENT_DTYPE
from servegym.errors import ConfigError, WorkloadError
from servegym.serve.log_files import Jsonl, Parquet, Row
from servegym.workloads.records import columns_of, records

_log = logging.getLogger(__name__)

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

    While files cannot be written, as a disk is full or read-only, rows wait in memory, and those
    beyond `max_queue` are dropped; it goes on, where it stopped, when there is room.

    Args:
        config: Where to.

    Attributes:
        num_failed: Attempts to write that failed.

    Raises:
        ConfigError: If the folder cannot be written, or pyarrow is missing.
    """

    def __init__(self, config: DecisionLogConfig) -> None:
        self.config = config
        self.num_failed = 0
        self._num_refused = 0
        self._dropped_before = -1  # rows, where the last attempt to write failed; else -1
        try:
            config.folder.mkdir(parents=True, exist_ok=True)
            usable = os.access(config.folder, os.W_OK)
        except OSError:
            usable = False
        if not usable:
            raise ConfigError(f"{config.folder} cannot be written: give a folder for the log")
        made = Jsonl if config.format == "jsonl" else Parquet
        self._files = made(config.folder, config.max_file_rows, config.max_files)
        self._queue: queue.Queue[Row | None] = queue.Queue(config.max_queue)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    @property
    def num_written(self) -> int:
        """Rows that are on disk, or with the operating system."""
        return self._files.num_written

    @property
    def num_dropped(self) -> int:
        """Rows that found the queue full, or could not be written."""
        return self._num_refused + self._files.num_lost

    def put(self, row: Row) -> None:
        """Hand a row over; never waits."""
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._num_refused += 1

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what is waiting, if it can be written, and close the file."""
        self._closing.set()
        with contextlib.suppress(queue.Full):  # then it is awake
            self._queue.put_nowait(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        flush_s = time.monotonic() + _FLUSH_S
        while True:
            is_closing = self._closing.is_set()
            try:
                row = self._queue.get(timeout=0.0 if is_closing else _FLUSH_S)
            except queue.Empty:
                if is_closing:
                    break
            else:
                if row is not None:
                    self._add(row)
            if self._files.is_due or time.monotonic() >= flush_s:
                if not self._write(self._files.flush):
                    break
                flush_s = time.monotonic() + _FLUSH_S
        self._write(self._files.close)
        self._num_refused += self._files.num_waiting
        while not self._queue.empty():
            self._num_refused += self._queue.get_nowait() is not None

    def _add(self, row: Row) -> None:
        try:
            self._files.add(row)
        except (ValueError, TypeError) as error:
            self._num_refused += 1
            _log.error("a row of the decision log cannot be written: %s", error)

    def _write(self, write: Callable[[], None]) -> bool:
        """Write, as soon as that can be done; return whether it could before the end."""
        while True:
            try:
                write()
            except OSError as error:
                self.num_failed += 1
                if self._dropped_before < 0:
                    self._dropped_before = self.num_dropped
                    _log.error(
                        "the decision log cannot be written (%s): rows wait, and beyond %d are "
                        "lost; requests go on",
                        error,
                        self.config.max_queue,
                    )
            else:
                if self._dropped_before >= 0:
                    lost = self.num_dropped - self._dropped_before
                    self._dropped_before = -1
                    _log.warning("the decision log is written again; %d rows were lost", lost)
                return True
            if self._closing.wait(_FLUSH_S):
                return False


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
