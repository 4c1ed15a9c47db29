"""A trace as it was read, and what is to be said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from servegym.typing import BoolArray
from servegym.workloads.dialect import TimeUnit
from servegym.workloads.followed import Links
from servegym.workloads.sessions import Sessions
from servegym.workloads.shortening import Shortened
from servegym.workloads.table import RequestTable


@dataclass(frozen=True)
class Trace:
    """A request stream read from a file.

    Attributes:
        table: The requests, arrivals shifted to start at 0 and sorted.
        name: File name.
        num_skipped: Rows left out with `on_bad_row="skip"`.
        first_bad: What was wrong with the first of them, or "".
        class_given: Which requests have an SLO class in the file, `bool[n]`.
        time_unit: What its times count.
        hash_block_tokens: Tokens of a prefix hash; None without hashes.
        shortened: Requests cut or left out as too long, None if there were none.
        concluded: What was found out about the units, in sentences.
        links: Who followed whom in a router's log, None in others or if nobody did.
        sessions: Recorded sessions, which have no common time: `table` has each of them begin at 0.
    """

    table: RequestTable
    name: str
    num_skipped: int
    first_bad: str
    class_given: BoolArray
    time_unit: TimeUnit
    hash_block_tokens: int | None
    shortened: Shortened | None
    concluded: tuple[str, ...]
    links: Links | None = None
    sessions: Sessions | None = None

    def headline(self) -> str:
        """How many requests there are, and how fast they came as recorded."""
        table = self.table
        if self.sessions is not None:
            return f"{self.name}: {len(table):,} calls of {len(self.sessions):,} recorded sessions"
        span_s = float(table.arrival_s[table.after < 0][-1])
        waiting = table.num_waiting
        rate = f"{table.rate_rps:,.4g}/s"
        if waiting:
            alone = f"{len(table) - waiting:,} by themselves"
            when = f"over {span_s:,.6g} s, {rate} in the long run" if span_s else "at one time"
            return (
                f"{self.name}: {len(table):,} requests, {alone} {when}, as recorded, and"
                f" {waiting:,} after the answers to others"
            )
        when = f"over {span_s:,.6g} s, {rate}" if span_s else "at one time"
        return f"{self.name}: {len(table):,} requests {when}, as recorded"

    def remarks(self) -> list[str]:
        """What the reader of a result must know of the file, in sentences."""
        said = list(self.concluded)
        if self.num_skipped:
            said.append(f"skipped {self.num_skipped} rows; the first: {self.first_bad}")
        if self.shortened:
            said.append(f"{self.name}: {self.shortened.sentence}")
        if self.links:
            said.append(f"{self.name}: {self.links.sentence}")
        return said

    def counts(self) -> dict[str, Any]:
        """The same as numbers; docs/evaluation.md describes the keys."""
        cut, links = self.shortened, self.links
        return {
            "file": self.name,
            "requests": len(self.table),
            "waiting_requests": self.table.num_waiting,
            "guessed_waiting_requests": links.num_by["prefix"] if links else 0,
            "requests_without_predecessor": links.num_cut if links else 0,
            "rate_rps": self.table.rate_rps,
            "time_unit": self.time_unit,
            "hash_block_tokens": self.hash_block_tokens,
            "skipped_rows": self.num_skipped,
            "first_skipped": self.first_bad or None,
            "cut_requests": cut.num_requests if cut and cut.how == "cut" else 0,
            "left_out_requests": cut.num_requests if cut and cut.how == "skip" else 0,
            "tokens_not_played": cut.num_tokens if cut else 0,
            "max_context_tokens": cut.max_context_tokens if cut else None,
        }
