"""Agents at work: sessions of calls with tools between them and contexts that grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.typing import IntArray
from servegym.workloads import fitted_sessions as fitted
from servegym.workloads.classes import draw_classes
from servegym.workloads.mixtures import LengthConfig, Seconds, WorkloadPart
from servegym.workloads.sessions import Sessions
from servegym.workloads.table import RequestTable

#: Sessions an episode draws its stream from, with replacement.
_POOL = 256


class AgentsConfig(WorkloadPart):
    """Sessions of agents, which wait for answers and tools.

    A call's prompt is the prompt before, its answer, and what the tool returned or the user said
    (`added`); engines find all but that in their prefix caches, unless it was evicted. A call
    comes after the answer before and a time at tools or, where the answer ends a turn, a pause.
    Now and then, and where the context would exceed `max_context_tokens`, the agent rewrites its
    context, of which only the beginning is then the same. Sessions begin in a Poisson process and
    are under way at time 0. Defaults are fitted to recorded sessions (`fitted_sessions`);
    `system_prompt_tokens` and `max_pause_s` are choices, and sub-agents are left out.
    """

    kind: Literal["agents"] = "agents"
    rate_rps: float = Field(gt=0)
    calls: LengthConfig = fitted.CALLS
    first_prompt: LengthConfig = fitted.FIRST_PROMPT
    added: LengthConfig = fitted.ADDED
    output: LengthConfig = fitted.OUTPUT
    tool: Seconds = fitted.TOOL
    pause: Seconds = fitted.PAUSE
    pause_probability: float = Field(fitted.PAUSE_PROBABILITY, ge=0, le=1)
    rewrite_probability: float = Field(fitted.REWRITE_PROBABILITY, ge=0, le=1)
    rewrite_shrinks: float = Field(fitted.REWRITE_SHRINKS, ge=0, le=1)
    system_prompt_tokens: int = Field(8192, ge=0)
    max_context_tokens: int = Field(131072, ge=16)
    max_pause_s: float = Field(3600.0, ge=0)
    num_tenants: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if self.max_context_tokens < self.system_prompt_tokens + 2:
            raise ValueError(
                f"max_context_tokens ({self.max_context_tokens}) must exceed system_prompt_tokens "
                f"({self.system_prompt_tokens}) by 2 or more"
            )
        return self

    @property
    def pace(self) -> str:
        """What load 1 means."""
        return f"{self.rate_rps:g}/s"

    def table(
        self,
        rng: np.random.Generator,
        *,
        num_requests: int,
        load: float = 1.0,
        class_shares: Sequence[float] = (1.0,),
    ) -> RequestTable:
        """Draw a stream.

        Args:
            rng: Randomness.
            num_requests: Calls.
            load: Multiplies the rate at which sessions begin.
            class_shares: Shares of the SLO classes, drawn by session, as are tenants.
        """
        pool = self.pool(rng, _POOL)
        table = pool.stream(rng, num_requests, self.rate_rps * load)
        slo_class = draw_classes(rng, table, class_shares)
        tenant = rng.integers(0, self.num_tenants, num_requests)[table.conversation]
        return replace(table, slo_class=slo_class, tenant=tenant.astype(np.int32))

    def pool(self, rng: np.random.Generator, num: int) -> Sessions:
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
        delay_s = np.where(ends_turn, pause_s, self.tool.draw_many(rng, n))
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
        least_prompt = self.system_prompt_tokens + 1
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
            begin = np.maximum((both * alike[rows]).astype(np.int64), self.system_prompt_tokens)
            shared[rows] = np.where(over | rewrites[rows], np.minimum(both, begin), said)
            prompt[rows], answer[rows] = new, np.minimum(output[rows], limit - new)
            old, said = new, new + answer[rows]
        return prompt, answer, shared
