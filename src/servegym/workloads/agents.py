"""Agents at work: sessions of calls with tools between them and contexts that grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.typing import Int32Array, IntArray
from servegym.workloads import fitted_sessions as fitted
from servegym.workloads.classes import draw_tenants
from servegym.workloads.mixtures import LengthConfig, Seconds, WorkloadPart
from servegym.workloads.sessions import Sessions
from servegym.workloads.table import RequestTable
from servegym.workloads.workload import Workload

#: Users, or sessions where there are none, that an episode draws its stream from, with replacement.
_POOL = 256


class UsersConfig(WorkloadPart):
    """Users who run several agents: each comes, has its sessions, and leaves.

    At most `at_once` sessions of a user are under way. So many begin as the user comes, or one
    after the other with `start_gap` between them; each of the others begins a `pause` after the
    end of the one that is `at_once` places before it. With 1 a user has one session after the
    other, with as many as the longest list has all of them begin as the user comes. All prompts of
    a user go on, after the system prompt, with the same `context_tokens`: the files and rules of a
    project.

    No recorded sessions say whose they are or share a clock, so that all of this is assumed.

    Attributes:
        sessions: Of a user; a number, not tokens.
        at_once: Agents that a user runs at the same time, at most.
        start_gap: Between the beginnings of the first ones; None: they begin together.
        pause: From the end of a session to the beginning of the one that follows it.
        context_tokens: Of the text that a user's sessions share.
    """

    sessions: LengthConfig = LengthConfig(medians_tokens=(4.0,), sigmas=(0.7,), max_tokens=40)
    at_once: int = Field(2, ge=1)
    start_gap: Seconds | None = None
    pause: Seconds = Seconds(medians_s=(300.0,), sigmas=(1.0,))
    context_tokens: int = Field(4096, ge=0)


class AgentsConfig(fitted.AgentSession, Workload):
    """Sessions of agents, which wait for answers and tools.

    A call's prompt is the prompt before, its answer, and what the tool returned or the user said
    (`added`); engines find all but that in their prefix caches, unless it was evicted. A call
    comes after the answer before and a time at tools or, where the answer ends a turn, a pause.
    Now and then, and where the context would exceed `max_context_tokens`, the agent rewrites its
    context, of which only the beginning is then the same. Sessions, or `users` with several each,
    begin in a Poisson process and are under way at time 0; load multiplies their rate. Defaults
    are fitted to recorded sessions (`fitted_sessions`); `system_prompt_tokens`, `max_pause_s` and
    all of `users` are choices, and sub-agents are left out. Tenants are the users, else drawn by
    session. The parts of `tool` count as tools, 0 and on, and the number behind them is a pause:
    what an engine can read off the answer.
    """

    kind: Literal["agents"] = "agents"
    rate_rps: float = Field(gt=0)
    added: LengthConfig = fitted.ADDED
    system_prompt_tokens: int = Field(8192, ge=0)
    max_context_tokens: int = Field(131072, ge=16)
    users: UsersConfig | None = None
    num_tenants: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if self.max_context_tokens < self._common_tokens + 2:
            name, size = "system_prompt_tokens", f"{self.system_prompt_tokens}"
            if self.users:
                name += " and context_tokens of users"
                size += f" + {self.users.context_tokens}"
            raise ValueError(
                f"max_context_tokens ({self.max_context_tokens}) must exceed {name} ({size}) by 2 "
                "or more"
            )
        if self.users and self.num_tenants > 1:
            raise ValueError(
                f"num_tenants is {self.num_tenants}, but with users each of them is a tenant: "
                "leave one of them out"
            )
        return self

    @property
    def _common_tokens(self) -> int:
        """Tokens that all prompts of a user begin with."""
        return self.system_prompt_tokens + (self.users.context_tokens if self.users else 0)

    @property
    def pace(self) -> str:
        """What load 1 means."""
        return f"{self.rate_rps:g}/s"

    def _draw(
        self, rng: np.random.Generator, num_requests: int, load: float
    ) -> tuple[RequestTable, None]:
        return self.pool(rng, _POOL).stream(rng, num_requests, self.rate_rps * load), None

    def _tenants(self, rng: np.random.Generator, stream: RequestTable) -> Int32Array:
        return stream.tenant if self.users else draw_tenants(rng, stream, self.num_tenants)

    def pool(self, rng: np.random.Generator, num: int) -> Sessions:
        """Draw the sessions of `num` users, or so many sessions where there are no users."""
        if self.users is None:
            return self._chains(rng, num)
        counts = self.users.sessions.draw(rng, num)
        return self._of_users(rng, self.users, counts, self._chains(rng, int(counts.sum())))

    def _of_users(
        self, rng: np.random.Generator, users: UsersConfig, counts: IntArray, chains: Sessions
    ) -> Sessions:
        """Give users their sessions, at random, and let these follow each other.

        Args:
            rng: Randomness.
            users: How they do.
            counts: Sessions of each user, `int64[u]`.
            chains: All of the sessions.
        """
        num = len(chains)
        order = rng.permutation(num)
        calls = np.diff(chains.first)[order]
        first = np.cumsum(calls) - calls
        row = np.repeat(chains.first[order] - first, calls) + np.arange(len(chains.session))
        place = np.empty(len(row), np.int64)
        place[row] = np.arange(len(row))
        before = np.where(chains.after[row] < 0, -1, place[chains.after[row]])
        after, delay_s = before.copy(), chains.delay_s[row]
        nth = np.arange(num) - np.repeat(np.cumsum(counts) - counts, counts)
        later = np.flatnonzero(nth >= users.at_once)
        waits_for = later - users.at_once
        after[first[later]] = first[waits_for] + calls[waits_for] - 1
        pause_s = users.pause.draw_many(rng, len(later))
        delay_s[first[later]] = np.minimum(self.max_pause_s, pause_s)
        assert chains.tool is not None
        if users.start_gap is not None:
            gap_s = np.where(nth > 0, users.start_gap.draw_many(rng, num), 0.0)
            since_s = np.cumsum(gap_s)
            since_s -= np.repeat(since_s[nth == 0], counts)
            soon = nth < users.at_once
            delay_s[first[soon]] = since_s[soon]
        return replace(
            chains,
            session=np.repeat(np.arange(num), calls),
            prompt_tokens=chains.prompt_tokens[row],
            output_tokens=chains.output_tokens[row],
            after=after,
            delay_s=delay_s,
            continues=before,
            shared_tokens=chains.shared_tokens[row],
            user=np.repeat(np.repeat(np.arange(len(counts)), counts), calls),
            user_tokens=users.context_tokens,
            tool=chains.tool[row],
        )

    def _chains(self, rng: np.random.Generator, num: int) -> Sessions:
        """Draw `num` sessions, each a chain."""
        # the longest first: those that have a k-th call are the first so many
        calls = np.sort(self.calls.draw(rng, num))[::-1]
        first = np.cumsum(calls) - calls
        n = int(calls.sum())
        row = np.arange(n)
        begins = np.isin(row, first)
        output, added = self.output.draw(rng, n), self.added.draw(rng, n)
        pause_s = np.minimum(self.max_pause_s, self.pause.draw_many(rng, n))
        ends_turn = rng.random(n) < self.pause_probability
        tool_s, tool = self.tool.draw_parts(rng, n)
        delay_s = np.where(ends_turn, pause_s, tool_s)
        prompt, output, shared = self._contexts(rng, calls, first, output, added)
        before = np.where(begins, -1, row - 1)
        return Sessions(
            session=np.repeat(np.arange(num), calls),
            prompt_tokens=prompt,
            output_tokens=output,
            after=before,
            delay_s=np.where(begins, 0.0, delay_s),
            continues=before,
            shared_tokens=shared,
            system_tokens=self.system_prompt_tokens,
            tool=np.where(begins, -1, np.where(ends_turn, len(self.tool.weights), tool)),
        )

    def _contexts(
        self,
        rng: np.random.Generator,
        calls: IntArray,
        first: IntArray,
        output: IntArray,
        added: IntArray,
    ) -> tuple[IntArray, IntArray, IntArray]:
        """Let contexts grow: prompts, answers cut to the limit, and what is shared, of each call.

        Args:
            rng: Randomness.
            calls: Of each session, descending, `int64[s]`.
            first: Row of the first one, `int64[s]`.
            output: Length of each answer, `int64[n]`.
            added: What each prompt has more than what was said before, `int64[n]`.
        """
        n, limit = len(output), self.max_context_tokens
        rewrites = rng.random(n) < self.rewrite_probability
        shrinks = rng.random(n) < self.rewrite_shrinks
        keeps = rng.uniform(*fitted.REWRITE_KEEPS, n)
        alike = rng.beta(*fitted.REWRITE_SHARES, n)
        rewrites[first] = False
        prompt, answer, shared = (np.zeros(n, np.int64) for _ in range(3))
        least_prompt = self._common_tokens + 1
        grown = np.maximum(self.first_prompt.draw(rng, len(first)), least_prompt)
        old = said = np.zeros(len(first), np.int64)
        for k in range(int(calls[0])):
            rows = first[: np.count_nonzero(calls > k)] + k
            old, said = old[: len(rows)], said[: len(rows)]
            if k:
                grown = said + added[rows]
            over = grown + output[rows] > limit
            shorter = (np.minimum(grown, limit) * keeps[rows]).astype(np.int64)
            shrunk = over | (rewrites[rows] & shrinks[rows])
            new = np.where(shrunk, np.maximum(shorter, least_prompt), grown)
            both = np.minimum(old, new)
            begin = np.maximum((both * alike[rows]).astype(np.int64), self._common_tokens)
            shared[rows] = np.where(over | rewrites[rows], np.minimum(both, begin), said)
            prompt[rows], answer[rows] = new, np.minimum(output[rows], limit - new)
            old, said = new, new + answer[rows]
        return prompt, answer, shared
