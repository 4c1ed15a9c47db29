"""Sessions of calls that wait for one another, and streams of such sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from servegym.errors import WorkloadError
from servegym.typing import BoolArray, FloatArray, IntArray
from servegym.workloads.recorded import BLOCK_TOKENS, MAIN, RecordedSession
from servegym.workloads.table import BY_ITSELF, RequestTable

_MAX = int(np.iinfo(np.int32).max)
#: Key of the text that all sessions begin with.
_SYSTEM_KEY = 1
#: In place of the row that a text is named by: that of all, and that of a user.
_OF_ALL, _OF_USER = -1, -2
_MOST_DRAWS = 12


@dataclass(frozen=True)
class Sessions:
    """A pool of sessions, a row a call; a call comes after those it waits for.

    A user's sessions come together: whoever draws from the pool draws users.

    Attributes:
        session: Number of the session, `int64[n]`; the rows of one follow each other.
        prompt_tokens: `int64[n]`.
        output_tokens: `int64[n]`.
        after: Row whose answer it waits for, -1 for none, `int64[n]`.
        delay_s: From that answer to the call, or from the coming of the user, `float64[n]`.
        continues: Row whose text it goes on from, -1 for none, `int64[n]`.
        shared_tokens: How far its prompt is that row's prompt and answer, `int64[n]`.
        system_tokens: With how many tokens of one text all prompts begin.
        user: Number of the user, `int64[n]`; the rows of one follow each other. None: every
            session is that of another.
        user_tokens: With how many tokens of a text of their own the prompts of a user go on.
        tool: What it waits for besides that answer, a number, `int64[n]`; None: nobody says it.
    """

    session: IntArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    after: IntArray
    delay_s: FloatArray
    continues: IntArray
    shared_tokens: IntArray
    system_tokens: int = 0
    user: IntArray | None = None
    user_tokens: int = 0
    tool: IntArray | None = None

    def __len__(self) -> int:
        return int(self.session[-1]) + 1

    @property
    def _drawn_by(self) -> IntArray:
        """Number of what is drawn together, `int64[n]`."""
        return self.session if self.user is None else self.user

    def cut(self, prompt_tokens: IntArray, output_tokens: IntArray, rows: BoolArray) -> Sessions:
        """Return the given rows with other lengths; who waits for one left out is left out, too."""
        place = np.full(len(rows), -1)
        place[rows] = np.arange(rows.sum())
        columns: dict[str, Any] = {
            f.name: values[rows]
            for f in fields(self)
            if isinstance(values := getattr(self, f.name), np.ndarray)
        }
        columns.update(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        for name in columns.keys() & {"session", "user"}:
            columns[name] = np.unique(columns[name], return_inverse=True)[1]
        for name in ("after", "continues"):
            columns[name] = np.where(columns[name] < 0, -1, place[columns[name]])
        return replace(self, **columns)

    @cached_property
    def first(self) -> IntArray:
        """First row of each user and the end of the last, `int64[u+1]`."""
        drawn_by = self._drawn_by
        return np.searchsorted(drawn_by, np.arange(drawn_by[-1] + 2))

    @cached_property
    def begin_s(self) -> FloatArray:
        """When each call comes, from its user on, if answers take no time, `float64[n]`."""
        begin = np.where(self.after < 0, self.delay_s, 0.0)
        for i in np.flatnonzero(self.after >= 0).tolist():
            begin[i] = begin[self.after[i]] + self.delay_s[i]
        return begin

    @cached_property
    def length_s(self) -> FloatArray:
        """How long each user stays if answers take no time, `float64[u]`."""
        return np.maximum.reduceat(self.begin_s, self.first[:-1])

    @cached_property
    def _text(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Text of each row, and what texts begin with.

        Calls that go on from all of the prompt and the answer before are of one text. Another call
        begins a text of its own, which goes on where it leaves the one before.

        Returns:
            Text of each row as its first row, `int64[n]`; and of texts, by that row, the segments:
            offsets `int64[n+1]`, which text each is a beginning of (`_OF_ALL`, `_OF_USER`: not one
            of a row) and its end.
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
        begins = [(_OF_ALL, self.system_tokens)] if self.system_tokens else []
        if self.user_tokens:
            begins.append((_OF_USER, self.system_tokens + self.user_tokens))
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
        """Return all calls, with every user from time 0 on."""
        order = np.argsort(self.begin_s, kind="stable")
        place = np.argsort(order)
        after = self.after[order]
        offsets, keys, ends = self._prefixes(
            order,
            np.full(len(order), _SYSTEM_KEY + 1),
            _SYSTEM_KEY + 1 + len(order) + self._drawn_by[order],
        )
        return RequestTable.build(
            self.begin_s[order],
            self.prompt_tokens[order],
            self.output_tokens[order],
            session=self.session[order],
            tenant=None if self.user is None else self.user[order],
            after=np.where(after < 0, BY_ITSELF, place[after]),
            delay_s=np.where(after < 0, 0.0, self.delay_s[order]),
            tool=None if self.tool is None else self.tool[order],
            prefix_offsets=offsets,
            prefix_keys=keys,
            prefix_ends=ends,
        )

    def stream(self, rng: np.random.Generator, num_requests: int, rate_rps: float) -> RequestTable:
        """Draw a stream in which users come at random, as if it had always been going on.

        Users of the pool (without users: sessions) are drawn with replacement, and come in a
        Poisson process. Of what is under way at time 0 the next call comes by itself. Tenants are
        users, as many as were drawn.

        Args:
            rng: Randomness.
            num_requests: Calls, in order of arrival if answers take no time.
            rate_rps: Calls per second, likewise.

        Raises:
            WorkloadError: If the sessions are too short or too few to go on so fast.
        """
        num_users = len(self.first) - 1
        per_user = len(self.session) / num_users
        window_s = 1.2 * num_requests / rate_rps
        for _ in range(_MOST_DRAWS):
            # those that are under way at some time between 0 and window_s
            within_s = self.length_s + window_s
            number = int(rng.poisson(rate_rps / per_user * within_s.mean()))
            drawn = rng.choice(num_users, number, p=within_s / within_s.sum())
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
        num_rows = len(row)
        row, instance, moved = row[heard], instance[heard], moved[heard]
        salt = int(rng.integers(1, 1 << 31)) << 31
        offsets, keys, ends = self._prefixes(row, salt + moved, salt + num_rows + instance)
        user = np.unique(instance, return_inverse=True)[1]
        return RequestTable.build(
            arrival_s[heard],
            self.prompt_tokens[row],
            self.output_tokens[row],
            session=np.unique(user * len(self) + self.session[row], return_inverse=True)[1],
            tenant=None if self.user is None else user,
            after=after,
            delay_s=np.where(after == BY_ITSELF, 0.0, self.delay_s[row]),
            tool=None if self.tool is None else self.tool[row],
            prefix_offsets=offsets,
            prefix_keys=keys,
            prefix_ends=ends,
        )

    def _prefixes(
        self, row: IntArray, number: IntArray, user_key: IntArray
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Segments of rows: offsets, keys and ends.

        Args:
            row: Rows of the pool, `int64[m]`.
            number: What is added to a row that names a text to make a key, `int64[m]`.
            user_key: Key of the user's text, `int64[m]`.
        """
        text, offsets, of_text, ends = self._text
        start = offsets[text[row]]
        counts = offsets[text[row] + 1] - start
        out = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        at = np.repeat(start - out[:-1], counts) + np.arange(out[-1])
        of = of_text[at]
        keys = np.where(of == _OF_ALL, _SYSTEM_KEY, of + np.repeat(number, counts))
        return out, np.where(of == _OF_USER, np.repeat(user_key, counts), keys), ends[at]


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
