"""Rows of decision logs: from which files, and whether they can be used."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from servegym.errors import WorkloadError
from servegym.serve.decision_log import LOGGED_HOLD
from servegym.workloads.followed import Followed, parse_followed
from servegym.workloads.readers import OnBadRow
from servegym.workloads.records import columns_of, records

STATUSES = ("finished", "rejected", "cancelled", "failed")


class LoggedRequest(NamedTuple):
    """A row of the log; times count from its arrival."""

    key: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    predicted_output_tokens: float
    cached_tokens: int
    slo_class: int
    slo_class_name: str
    tenant: int
    hashes: list[int]
    status: str
    replica: int
    replica_name: str | None
    dispatch_s: float
    ttft_s: float
    e2e_s: float
    num_retries: int
    num_holds: int
    policy: str | None
    fallbacks: int
    decisions: int
    followed: Followed | None


def log_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of logs given as files or folders, oldest first.

    Raises:
        WorkloadError: If there is nothing.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            there = [*path.glob("requests-*.jsonl*"), *path.glob("requests-*.parquet")]
            if not there:
                raise WorkloadError(
                    f"{path} has no file of a decision log, such as requests-….jsonl: give the "
                    "folder that the router's dispatch.log names"
                )
            files += sorted(there)
        else:
            files.append(path)
    if not files:
        raise WorkloadError("no log given: give files or folders of a decision log")
    double = [path for path, count in Counter(f.resolve() for f in files).items() if count > 1]
    if double:
        raise WorkloadError(f"{double[0].name} is given twice: give each file once")
    return files


def logged_rows(
    paths: Sequence[Path], on_bad_row: OnBadRow, bad: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, row)` of logs; `bad` receives what was wrong with rows left out.

    Raises:
        WorkloadError: At the first row that cannot be used, unless rows are to be skipped.
    """
    for file in log_files(paths):
        last, lines = 0, records(file)
        for line, record in lines:
            last = line
            where = f"{file.name}, line {line}"
            try:
                row = columns_of(where, record)
                if "decisions" not in row:
                    raise WorkloadError(
                        f"{where} is no row of a decision log, it has no decisions: give the log "
                        "of a router, not a trace"
                    )
                yield where, row
            except WorkloadError as error:
                torn = isinstance(record, str) and not record.endswith("\n")
                hint = " (the line is torn: its writer was stopped in the middle of it)"
                text = f"{error}{hint if torn else ''}"
                if on_bad_row == "error":
                    raise WorkloadError(f"{text}; --on-bad-row skip leaves it out") from None
                bad.append(text)
        if last == 0:
            bad.append(f"{file.name} is empty")


def parse_row(where: str, record: dict[str, Any]) -> LoggedRequest:
    """Check one row of a decision log.

    Raises:
        WorkloadError: If a column is missing, as in a log of another version, or impossible.
    """
    row = _Row(where, record)
    status = row.text("status")
    if status not in STATUSES:
        raise WorkloadError(f"{where}: status {status!r} must be one of {', '.join(STATUSES)}")
    decisions = row.decisions()
    placed = [d for d in decisions if d["action"] >= 0]
    replica, name = row.whole("replica", -1), record.get("replica_name")
    if replica < 0 and placed:  # it had been taken back when it ended
        replica, name = int(placed[-1]["action"]), None
    ttft_s, e2e_s = row.seconds("ttft_s", none=True), row.seconds("e2e_s")
    dispatch_s = float(placed[-1]["after_s"]) if placed else math.nan
    if status == "finished" and not (dispatch_s <= ttft_s <= e2e_s):
        raise WorkloadError(
            f"{where}: a finished request must be dispatched ({dispatch_s:g} s), have its first "
            f"token ({ttft_s:g} s) and end ({e2e_s:g} s) in this order"
        )
    hashes = [] if record.get("hash_ids") is None else record["hash_ids"]
    right = isinstance(hashes, list) and all(
        isinstance(h, int) and -(2**63) <= h < 2**64 for h in hashes
    )
    if not right:
        raise WorkloadError(f"{where}: hash_ids must be whole numbers of 64 bits")
    return LoggedRequest(
        key=str(record.get("key")),
        arrival_s=row.seconds("arrival_s"),
        prompt_tokens=row.whole("prompt_tokens", 1),
        output_tokens=row.whole("output_tokens", 1),
        predicted_output_tokens=max(1.0, row.seconds("predicted_output_tokens")),
        cached_tokens=-1 if record.get("cached_tokens") is None else row.whole("cached_tokens", 0),
        slo_class=row.whole("slo_class", 0),
        slo_class_name=str(record.get("slo_class_name") or "default"),
        tenant=row.whole("tenant", 0),
        hashes=hashes,
        status=status,
        replica=replica,
        replica_name=None if name is None else str(name),
        dispatch_s=dispatch_s,
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        num_retries=row.whole("num_retries", 0),
        num_holds=sum(d["action"] == LOGGED_HOLD for d in decisions),
        policy=decisions[-1].get("policy") if decisions else None,
        fallbacks=sum(d.get("by") == "fallback" for d in decisions),
        decisions=len(decisions),
        followed=parse_followed(where, record.get("follows")),
    )


class _Row:
    """Columns of a row, checked."""

    def __init__(self, where: str, record: dict[str, Any]) -> None:
        self._where, self._record = where, record

    def _get(self, column: str) -> Any:
        if column not in self._record:
            raise WorkloadError(
                f"{self._where} has no column {column}: it was written by another version of the "
                "decision log"
            )
        return self._record[column]

    def text(self, column: str) -> str:
        return str(self._get(column))

    def seconds(self, column: str, *, none: bool = False) -> float:
        value = self._get(column)
        if value is None and none:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
            raise WorkloadError(
                f"{self._where}, column {column}: {value!r} must be a finite number from 0"
            )
        return float(value)

    def whole(self, column: str, low: int) -> int:
        value = self._get(column)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise WorkloadError(
                f"{self._where}, column {column}: {value!r} must be a whole number from {low}"
            )
        return value

    def decisions(self) -> list[dict[str, Any]]:
        value = self._get("decisions")
        right = isinstance(value, list) and all(
            isinstance(d, dict)
            and isinstance(d.get("action"), int)
            and isinstance(d.get("after_s"), int | float)
            for d in value
        )
        if not right:
            raise WorkloadError(
                f"{self._where}, column decisions: must be a list, each with action and after_s"
            )
        found: list[dict[str, Any]] = value
        return found
