"""Decision logs as arrays: what arrived, where it went, how it was."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from servegym.errors import WorkloadError
from servegym.replay.fleet import Fleet
from servegym.serve.decision_log import LOGGED_HOLD
from servegym.typing import BoolArray, FloatArray, Int16Array, IntArray
from servegym.workloads.followed import Followed, Links, link_followed, parse_followed
from servegym.workloads.readers import OnBadRow, prefix_segments
from servegym.workloads.records import columns_of, records
from servegym.workloads.table import RequestTable

STATUSES = ("finished", "rejected", "cancelled", "failed")
#: An answer of more tokens than this whose first came with its last was not streamed.
_WHOLE_TOKENS = 4
_WHOLE_SHARE = 0.999


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


@dataclass(frozen=True)
class ReplayLog:
    """The requests of a log in order of arrival.

    Attributes:
        fleet: With the names that the log knows its replicas by.
        table: As a workload; arrivals count from the first one.
        links: Who waits for whom in it.
        status: Index into `STATUSES`, `int8[n]`.
        replica: Where each was last dispatched to, -1: nowhere, `int16[n]`.
        dispatch_s: Of that dispatch, after the arrival, `float64[n]`; NaN if there was none.
        ttft_s: After the arrival, NaN if no token came, `float64[n]`.
        e2e_s: After the arrival, `float64[n]`.
        streamed: Whether the first token was told apart from the last, `bool[n]`.
        num_retries: `int64[n]`.
        num_holds: `int64[n]`.
        cached_tokens: As the engine reports them, -1: it does not, `int64[n]`.
        class_names: By SLO class.
        deciders: How many decisions each policy stood by for, by its text or checksum.
        num_decisions: Of all requests.
        num_fallbacks: Decisions that the fallback took.
        files: Names of the files.
        num_skipped: Rows left out with `on_bad_row="skip"`.
        first_bad: What was wrong with the first of them, or "".
    """

    fleet: Fleet
    table: RequestTable
    links: Links
    status: IntArray
    replica: Int16Array
    dispatch_s: FloatArray
    ttft_s: FloatArray
    e2e_s: FloatArray
    streamed: BoolArray
    num_retries: IntArray
    num_holds: IntArray
    cached_tokens: IntArray
    class_names: tuple[str, ...]
    deciders: dict[str, int]
    num_decisions: int
    num_fallbacks: int
    files: tuple[str, ...]
    num_skipped: int
    first_bad: str

    def __len__(self) -> int:
        return len(self.table)

    @property
    def finished(self) -> BoolArray:
        """Which requests have all their tokens, `bool[n]`."""
        return np.asarray(self.status == STATUSES.index("finished"))

    @property
    def dispatched(self) -> BoolArray:
        """Which requests reached a replica, `bool[n]`."""
        return np.asarray((self.replica >= 0) & np.isfinite(self.dispatch_s))

    def counts(self) -> dict[str, int]:
        """How many requests ended in which way, were retried, held, or answered in one piece."""
        found = {name: int((self.status == i).sum()) for i, name in enumerate(STATUSES)}
        return {
            "requests": len(self),
            **found,
            "retried": int((self.num_retries > 0).sum()),
            "held": int((self.num_holds > 0).sum()),
            "not_streamed": int((self.finished & ~self.streamed).sum()),
            "following_by_session": self.links.num_by["session"],
            "following_by_prefix": self.links.num_by["prefix"],
            "without_predecessor": self.links.num_cut,
            "bad_rows": self.num_skipped,
        }


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


def read_log(paths: Sequence[Path], fleet: Fleet, *, on_bad_row: OnBadRow = "error") -> ReplayLog:
    """Read decision logs of one fleet.

    Args:
        paths: Files, or folders of rotated files.
        fleet: That was logged.
        on_bad_row: Refuse the log at the first malformed row, or count and leave out.

    Raises:
        WorkloadError: If a file or a row cannot be used; it names file and line.
        ConfigError: If the fleet does not have a replica of the log.
    """
    bad: list[str] = []
    rows: list[LoggedRequest] = []
    for where, record in logged_rows(paths, on_bad_row, bad):
        try:
            rows.append(parse_row(where, record))
        except WorkloadError as error:
            if on_bad_row == "error":
                raise WorkloadError(f"{error}; --on-bad-row skip leaves it out") from None
            bad.append(str(error))
    if not rows:
        raise WorkloadError("the log has no usable request" + (f": {bad[0]}" if bad else ""))
    rows.sort(key=lambda row: row.arrival_s)
    return _as_arrays(rows, fleet, tuple(f.name for f in log_files(paths)), bad)


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


def _as_arrays(
    rows: list[LoggedRequest], fleet: Fleet, files: tuple[str, ...], bad: list[str]
) -> ReplayLog:
    def column(name: str, dtype: type) -> Any:
        return np.array([getattr(row, name) for row in rows], dtype)

    place = [fleet.index(row.replica_name, row.replica) if row.replica >= 0 else -1 for row in rows]
    names: list[str | None] = [None] * len(fleet.names)
    for row, where in zip(rows, place, strict=True):
        if where >= 0 and row.replica_name is not None:
            names[where] = row.replica_name
    classes = [c.name for c in fleet.spec.slo_classes]
    for row in rows:
        if row.slo_class >= len(classes):
            raise WorkloadError(
                f"the log has SLO class {row.slo_class} ({row.slo_class_name}), the fleet given "
                f"only {', '.join(classes)}: give the one the router ran with"
            )
        classes[row.slo_class] = row.slo_class_name
    arrival = column("arrival_s", np.float64)
    output, status = column("output_tokens", np.int64), column("status", np.str_)
    ttft_s, e2e_s = column("ttft_s", np.float64), column("e2e_s", np.float64)
    code = np.array([STATUSES.index(s) for s in status.tolist()], np.int64)
    replica = np.array(place, np.int16)
    output = _tokens_made(output, code, replica, ttft_s, e2e_s)
    keys, ends, offsets = prefix_segments([row.hashes for row in rows])
    prompt = column("prompt_tokens", np.int64)
    end_s = np.where(code == STATUSES.index("finished"), arrival + e2e_s, np.nan)
    links = link_followed([row.key for row in rows], arrival, end_s, [row.followed for row in rows])
    table = RequestTable.build(
        arrival - arrival[0],
        prompt,
        output,
        slo_class=column("slo_class", np.int64),
        tenant=column("tenant", np.int64),
        after=links.after,
        delay_s=links.delay_s,
        predicted_output_tokens=column("predicted_output_tokens", np.float64),
        prefix_offsets=offsets,
        prefix_keys=keys,
        prefix_ends=ends,
    )
    whole = (output > _WHOLE_TOKENS) & (ttft_s >= _WHOLE_SHARE * e2e_s)
    return ReplayLog(
        fleet=fleet.named(names),
        table=table,
        links=links,
        status=code,
        replica=replica,
        dispatch_s=column("dispatch_s", np.float64),
        ttft_s=ttft_s,
        e2e_s=e2e_s,
        streamed=np.asarray(~whole),
        num_retries=column("num_retries", np.int64),
        num_holds=column("num_holds", np.int64),
        cached_tokens=column("cached_tokens", np.int64),
        class_names=tuple(classes),
        deciders=dict(Counter(row.policy for row in rows if row.policy)),
        num_decisions=int(column("decisions", np.int64).sum()),
        num_fallbacks=int(column("fallbacks", np.int64).sum()),
        files=files,
        num_skipped=len(bad),
        first_bad=bad[0] if bad else "",
    )


def _tokens_made(
    output: IntArray, status: IntArray, replica: Int16Array, ttft_s: FloatArray, e2e_s: FloatArray
) -> IntArray:
    """Estimate how many tokens requests had when they were cut off.

    The log gives those that did not finish the length that they were expected to have; what a
    replica did for them is the time they had, at the pace of the others there.
    """
    made = output.copy()
    done = (status == 0) & (output > 1) & (e2e_s > ttft_s)
    pace = np.full(len(output), np.nan)
    pace[done] = (e2e_s[done] - ttft_s[done]) / (output[done] - 1)
    for r in np.unique(replica):
        here = replica == r
        known = pace[here & done]
        cut = here & (status != 0)
        tokens = np.ones(len(output))
        if len(known):
            tokens += np.nan_to_num((e2e_s - ttft_s) / np.median(known))
        made[cut] = np.clip(tokens[cut].astype(np.int64), 1, output[cut])
    return made
