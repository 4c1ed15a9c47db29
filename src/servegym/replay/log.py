"""Decision logs as arrays: what arrived, where it went, how it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servegym.errors import WorkloadError
from servegym.replay.fleet import Fleet
from servegym.replay.rows import STATUSES, LoggedRequest, log_files, logged_rows, parse_row
from servegym.typing import BoolArray, FloatArray, Int16Array, IntArray
from servegym.workloads.followed import Links, link_followed
from servegym.workloads.readers import OnBadRow, prefix_segments
from servegym.workloads.table import RequestTable

#: An answer of more tokens than this whose first came with its last was not streamed.
_WHOLE_TOKENS = 4
_WHOLE_SHARE = 0.999


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
