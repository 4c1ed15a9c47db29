"""The decision log: every request, how it was decided and how it went, readable as a trace.

One row a request, written when it ends, in files that rotate. The columns are those of the native
trace format (`workloads.readers`) and more; `docs/live.md` lists them. A thread writes; when it
cannot keep up, rows are dropped and counted, and serving goes on.
"""

from __future__ import annotations

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
from servegym.serve.log_files import Jsonl, LogFiles, Parquet, Row, WriteError
from servegym.workloads.records import columns_of, records

_log = logging.getLogger(__name__)

#: Tokens of a block of the trace format's hash ids.
TRACE_BLOCK_TOKENS = 512
#: Actions of the log that are no replica: unlike a mask's, they do not depend on the fleet's size.
LOGGED_HOLD, LOGGED_REJECT = -1, -2
#: Seconds that a row may wait in memory before it is flushed.
_FLUSH_S = 1.0
#: Seconds between two messages that it cannot be written.
_QUIET_S = 60.0


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
        num_written: Rows that are on disk, or with the operating system; of a Parquet file, once it
            is closed.
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
        self._lost_since, self._quiet_until_s = 0, -math.inf
        self._files = self._make_files()
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
        files = self._files
        while True:
            try:
                row = self._queue.get(timeout=_FLUSH_S)
            except queue.Empty:
                self._guard(files.flush)
                continue
            if row is None:
                self._guard(files.close)
                return
            self._guard(lambda row=row: files.write(row))

    def _make_files(self) -> LogFiles:
        config = self.config
        make = Jsonl if config.format == "jsonl" else Parquet
        return make(config.folder, config.max_file_rows, config.max_files)

    def _guard(self, act: Callable[[], int]) -> None:
        """Do it; a full disk costs rows, not the service."""
        try:
            count = act()
        except WriteError as error:
            self.num_dropped += error.num_rows
            self._lost_since += error.num_rows
            now_s = time.monotonic()
            if now_s >= self._quiet_until_s:  # not a line for every row while the disk is full
                self._quiet_until_s = now_s + _QUIET_S
                _log.error(
                    "the decision log cannot be written: %s; %d rows are lost so far,"
                    " serving goes on",
                    error,
                    self._lost_since,
                )
            return
        self.num_written += count
        if count and self._lost_since:
            _log.warning("the decision log is written again; %d rows are lost", self._lost_since)
            self._lost_since, self._quiet_until_s = 0, -math.inf


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
