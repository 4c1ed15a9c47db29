"""Sessions of calls that wait for one another, and streams of such sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import BoolArray, FloatArray, IntArray
from servegym.workloads.recorded import BLOCK_TOKENS, MAIN, RecordedSession
from servegym.workloads.table import BY_ITSELF, RequestTable

_MAX = int(np.iinfo(np.int32).max)
#: Key of the text that all sessions begin with.
_SYSTEM_KEY = 1
_MOST_DRAWS = 12


@dataclass(frozen=True)
class Sessions:
    """A pool of sessions, a row a call; a call comes after those it waits for.

    Attributes:
        session: Number of the session, `int64[n]`; the rows of one follow each other.
        prompt_tokens: `int64[n]`.
        output_tokens: `int64[n]`.
        after: Row whose answer it waits for, -1 for the first call of a session, `int64[n]`.
        delay_s: From that answer to the call, `float64[n]`.
        continues: Row whose text it goes on from, -1 for none, `int64[n]`.
        shared_tokens: How far its prompt is that row's prompt and answer, `int64[n]`.
        system_tokens: With how many tokens of one text all prompts begin.
    """

    session: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    after: IntArray
    delay_s: FloatArray
    continues: IntArray
    shared_tokens: IntArray
    system_tokens: int = 0

    def __len__(self) -> int:
        return int(self.session[-1]) + 1

    def cut(self, prompt_tokens: IntArray, output_tokens: IntArray, rows: BoolArray) -> Sessions:
        """Return the given rows with other lengths; who waits for one left out is left out, too."""
        place = np.full(len(rows), -1)
        place[rows] = np.arange(rows.sum())
        columns = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "system_tokens"
        }
        columns.update(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        columns["session"] = np.unique(columns["session"], return_inverse=True)[1]
        for name in ("after", "continues"):
            columns[name] = np.where(columns[name] < 0, -1, place[columns[name]])
        return Sessions(**columns, system_tokens=self.system_tokens)

    @cached_property
    def first(self) -> IntArray:
        """First row of each session and the end of the last, `int64[s+1]`."""
        return np.searchsorted(self.session, np.arange(len(self) + 1))

    @cached_property
    def begin_s(self) -> FloatArray:
        """When each call comes in its session if answers take no time, `float64[n]`."""
        begin = np.zeros(len(self.session))
        for i in np.flatnonzero(self.after >= 0).tolist():
            begin[i] = begin[self.after[i]] + self.delay_s[i]
        return begin

    @cached_property
    def length_s(self) -> FloatArray:
        """How long each session is if answers take no time, `float64[s]`."""
        return np.maximum.reduceat(self.begin_s, self.first[:-1])

    @cached_property
    def _text(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Text of each row, and what texts begin with.

        Calls that go on from all of the prompt and the answer before are of one text. Another call
        begins a text of its own, which goes on where it leaves the one before.

        Returns:
            Text of each row as its first row, `int64[n]`; and of texts, by that row, the segments:
            offsets `int64[n+1]`, which text each is a beginning of (-1: that of all) and its end.
        """
        n = len(self.session)
        before = np.maximum(self.continues, 0)
        prompt, answered = self.prompt_tokens[before], self.output_tokens[before]
        # counted in blocks, of which the last one of the prompt before is not whole
        whole = (self.continues >= 0) & (self.shared_tokens > prompt - BLOCK_TOKENS)
        whole &= self.prompt_tokens >= prompt + answered
        text = np.where(whole, self.continues, np.arange(n))
        while True:
            further = text[text]
            if (further == text).all():
                break
            text = further
        segments: dict[int, list[tuple[int, int]]] = {}
        begins = [(-1, self.system_tokens)] if self.system_tokens else []
        for i in np.flatnonzero(~whole).tolist():
            start = begins
            if self.continues[i] >= 0:
                shared = int(self.shared_tokens[i])
                old = segments[int(text[self.continues[i]])]
                starts = [0, *(end for _, end in old[:-1])]
                start = [
                    (key, min(end, shared))
                    for (key, end), begin in zip(old, starts, strict=True)
                    if begin < shared
                ] or begins
            segments[i] = [*start, (i, _MAX)]
        counts = np.zeros(n, np.int64)
        for i, found in segments.items():
            counts[i] = len(found)
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        flat = np.array([one for i in sorted(segments) for one in segments[i]], np.int64)
        return text, offsets, flat[:, 0], flat[:, 1]

    def at_once(self) -> RequestTable:
        """Return all calls, with every session from time 0 on."""
        order = np.argsort(self.begin_s, kind="stable")
        place = np.argsort(order)
        after = self.after[order]
        offsets, keys, ends = self._prefixes(order, np.full(len(order), _SYSTEM_KEY + 1))
        return RequestTable.build(
            self.begin_s[order],
            self.prompt_tokens[order],
            self.output_tokens[order],
            session=self.session[order],
            after=np.where(after < 0, BY_ITSELF, place[after]),
            delay_s=self.delay_s[order],
            prefix_offsets=offsets,
            prefix_keys=keys,
            prefix_ends=ends,
        )

    def stream(self, rng: np.random.Generator, num_requests: int, rate_rps: float) -> RequestTable:
        """Draw a stream in which sessions begin at random, as if it had always been going on.

        Sessions of the pool are drawn with replacement, and begin in a Poisson process. Of those
        that are under way at time 0 the next call comes by itself.

        Args:
            rng: Randomness.
            num_requests: Calls, in order of arrival if answers take no time.
            rate_rps: Calls per second, likewise.

        Raises:
            WorkloadError: If the sessions are too short or too few to go on so fast.
        """
        per_session = len(self.session) / len(self)
        window_s = 1.2 * num_requests / rate_rps
        for _ in range(_MOST_DRAWS):
            # those that are under way at some time between 0 and window_s
            within_s = self.length_s + window_s
            number = int(rng.poisson(rate_rps / per_session * within_s.mean()))
            drawn = rng.choice(len(self), number, p=within_s / within_s.sum())
            start_s = rng.random(number) * within_s[drawn] - self.length_s[drawn]
            counts = np.diff(self.first)[drawn]
            offset = np.cumsum(counts) - counts
            instance = np.repeat(np.arange(number), counts)
            row = np.arange(len(instance)) + (self.first[drawn] - offset)[instance]
            arrival_s = start_s[instance] + self.begin_s[row]
            heard = np.flatnonzero((arrival_s >= 0) & (arrival_s <= window_s))
            if len(heard) >= num_requests:
                break
            window_s *= 1.3
        else:
            raise WorkloadError(
                f"{len(self)} sessions make no {num_requests:,} calls within {window_s:,.4g} s at"
                f" {rate_rps:g}/s: take fewer requests or a higher rate"
            )
        # equal times in order of rows: those that are waited for come first
        heard = heard[np.argsort(arrival_s[heard], kind="stable")][:num_requests]
        moved = (offset - self.first[drawn])[instance]
        place = np.full(len(row) + 1, BY_ITSELF)
        place[heard] = np.arange(num_requests)
        after = place[np.where(self.after[row] < 0, -1, self.after[row] + moved)][heard]
        row, instance, moved = row[heard], instance[heard], moved[heard]
        salt = int(rng.integers(1, 1 << 31))
        offsets, keys, ends = self._prefixes(row, (salt << 31) + moved)
        return RequestTable.build(
            arrival_s[heard],
            self.prompt_tokens[row],
            self.output_tokens[row],
            session=np.unique(instance, return_inverse=True)[1],
            after=after,
            delay_s=np.where(after == BY_ITSELF, 0.0, self.delay_s[row]),
            prefix_offsets=offsets,
            prefix_keys=keys,
            prefix_ends=ends,
        )

    def _prefixes(self, row: IntArray, number: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Segments of rows: offsets, keys and ends; `number` is added to keys of texts."""
        text, offsets, of_text, ends = self._text
        start = offsets[text[row]]
        counts = offsets[text[row] + 1] - start
        out = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        at = np.repeat(start - out[:-1], counts) + np.arange(out[-1])
        keys = np.where(of_text[at] < 0, _SYSTEM_KEY, of_text[at] + np.repeat(number, counts))
        return out, keys, ends[at]


def recorded_sessions(recorded: Sequence[RecordedSession]) -> tuple[Sessions, list[str]]:
    """Return recorded sessions as a pool, and where each row of it was recorded.

    A call comes the recorded gap after the answer before; a sub-agent's first one at once after
    that of the agent that began it, and shares nothing with it. Who began sub-agents goes on at
    once after the one whose calls have the longest gaps.
    """
    rows: list[tuple[int, int, int, int, float, int, int]] = []
    where: list[str] = []
    number = 0

    def chain(
        session: RecordedSession, agent: str, after: int, start_s: float
    ) -> tuple[float, int]:
        """Add an agent's calls; returns the last one, and when it comes if answers take no time."""
        now_s, delay_s, last = start_s, 0.0, -1
        calls = session.agents[agent]
        for i, call in enumerate(calls):
            row = len(rows)
            shared = min(call.shared_tokens, call.prompt_tokens) if i else 0
            rows.append(
                (number, call.prompt_tokens, call.output_tokens, after, delay_s, last, shared)
            )
            where.append(session.where)
            after = last = row
            if i + 1 == len(calls):
                break
            ends = []
            for name in call.spawned:
                if session.agents.get(name):
                    ends.append(chain(session, name, row, now_s))
            if ends:
                # a gap with sub-agents in it is the time that they took
                now_s, after = max(ends)
                delay_s = 0.0
            else:
                now_s, delay_s = now_s + call.gap_s, call.gap_s
        return now_s, last

    for session in recorded:
        if session.agents.get(MAIN):
            chain(session, MAIN, -1, 0.0)
            number += 1
    if not rows:
        where_first = recorded[0].where if recorded else "no session"
        raise WorkloadError(f"{where_first}: agent {MAIN} must have calls, in one session at least")
    whole = np.array([row[:4] + row[5:] for row in rows], np.int64).T
    return Sessions(
        session=whole[0],
        prompt_tokens=whole[1],
        output_tokens=whole[2],
        after=whole[3],
        delay_s=np.array([row[4] for row in rows]),
        continues=whole[4],
        shared_tokens=whole[5],
    ), where
