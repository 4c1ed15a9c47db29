"""Workloads as configuration: generated streams and replayed traces."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from servegym.errors import WorkloadError
from servegym.typing import BoolArray, FloatArray, Int32Array, IntArray
from servegym.workloads import arrivals
from servegym.workloads.agents import AgentsConfig
from servegym.workloads.classes import draw_tenants
from servegym.workloads.clients import ClientsConfig
from servegym.workloads.dialect import TimeUnit
from servegym.workloads.mixtures import LengthConfig, WorkloadPart
from servegym.workloads.readers import OnBadRow, read_trace
from servegym.workloads.shortening import TooLong
from servegym.workloads.table import BY_ITSELF, RequestTable
from servegym.workloads.trace import Trace
from servegym.workloads.workload import Workload

#: Longest prompt and output of a trace together, unless another is given: contexts that costs are
#: known for.
MAX_CONTEXT_TOKENS = 131072
_MAX_SPARE = 64.0  # turns drawn for each one that fits the context


class ArrivalConfig(WorkloadPart):
    """An arrival process; see `workloads.arrivals`."""

    kind: Literal["poisson", "gamma", "weibull", "bursts", "diurnal"] = "poisson"
    cv: float = Field(1.0, gt=0)
    burst_ratio: float = Field(4.0, ge=1)
    burst_share: float = Field(0.2, gt=0, lt=1)
    period_s: float = Field(60.0, gt=0)
    amplitude: float = Field(0.5, ge=0, lt=1)

    def draw(self, rng: np.random.Generator, num: int, rate_rps: float) -> FloatArray:
        """Draw arrival times in seconds, `float64[num]`."""
        if self.kind == "poisson":
            return arrivals.poisson(rng, num, rate_rps)
        if self.kind == "gamma":
            return arrivals.gamma(rng, num, rate_rps, self.cv)
        if self.kind == "weibull":
            return arrivals.weibull(rng, num, rate_rps, self.cv)
        if self.kind == "bursts":
            return arrivals.bursts(
                rng, num, rate_rps, self.burst_ratio, self.period_s, self.burst_share
            )
        return arrivals.diurnal(rng, num, rate_rps, self.amplitude, self.period_s)


class SessionConfig(WorkloadPart):
    """Conversations: each turn repeats all that was said before.

    A conversation starts with one of `num_system_prompts` system prompts (Zipf popularity); its
    turns come until it ends (geometric) or its context reaches `max_context_tokens`. Thinking
    takes `think_s` seconds on average and begins when the answer to the turn before has ended (a
    closed loop); without `wait_for_answers` when that turn began (an open loop).
    """

    mean_turns: float = Field(4.0, ge=1)
    think_s: float = Field(20.0, gt=0)
    wait_for_answers: bool = True
    num_system_prompts: int = Field(8, ge=1)
    system_prompt_tokens: int = Field(512, ge=0)
    zipf: float = Field(1.0, ge=0)
    max_context_tokens: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _leave_room(self) -> Self:
        if self.max_context_tokens <= self.system_prompt_tokens:
            raise ValueError(
                f"max_context_tokens ({self.max_context_tokens}) must exceed "
                f"system_prompt_tokens ({self.system_prompt_tokens})"
            )
        return self


class GeneratedConfig(Workload):
    """A synthetic stream."""

    kind: Literal["generated"] = "generated"
    rate_rps: float = Field(gt=0)
    arrivals: ArrivalConfig = ArrivalConfig()
    prompt: LengthConfig = LengthConfig()
    output: LengthConfig = LengthConfig(medians_tokens=(150.0,), max_tokens=2048)
    sessions: SessionConfig | None = None
    num_tenants: int = Field(1, ge=1)

    @property
    def pace(self) -> str:
        """What load 1 means."""
        return f"{self.rate_rps:g}/s"

    def _draw(
        self, rng: np.random.Generator, num_requests: int, load: float
    ) -> tuple[RequestTable, None]:
        rate = self.rate_rps * load
        if self.sessions is not None:
            return self._conversations(rng, num_requests, rate, self.sessions), None
        return RequestTable.build(
            self.arrivals.draw(rng, num_requests, rate),
            self.prompt.draw(rng, num_requests),
            self.output.draw(rng, num_requests),
        ), None

    def _tenants(self, rng: np.random.Generator, stream: RequestTable) -> Int32Array:
        return draw_tenants(rng, stream, self.num_tenants)

    def _conversations(
        self, rng: np.random.Generator, num: int, rate: float, c: SessionConfig, spare: float = 1.4
    ) -> RequestTable:
        # start conversations that together have a few turns to spare, some before time 0, so that
        # the stream is in its steady state from the first request on: lengths are about
        # exponential, so that exp(-5) of the older conversations are missing
        lead_s = 5.0 * c.mean_turns * c.think_s
        count = int(spare * (num + rate * lead_s) / c.mean_turns) + 16
        turns = np.minimum(rng.geometric(1.0 / c.mean_turns, count), 64)
        session = np.repeat(np.arange(count), turns)
        m = len(session)
        first = np.cumsum(turns) - turns
        start = self.arrivals.draw(rng, count, rate / c.mean_turns) - lead_s
        gaps = rng.exponential(c.think_s, m)
        gaps[first] = 0.0
        since = np.cumsum(gaps)
        arrival = start[session] + since - since[first][session]
        said, answered = self.prompt.numbers(rng, m), self.output.numbers(rng, m)
        popularity = (1.0 + np.arange(c.num_system_prompts)) ** -c.zipf
        system = rng.choice(c.num_system_prompts, count, p=popularity / popularity.sum())
        # lengths are made where they are needed: most turns come too early or too late
        for until_s in (_by_then(arrival, num + num // 4), math.inf):
            near = np.zeros(count, np.bool_)
            near[session[(arrival >= 0) & (arrival <= until_s)]] = True
            whole = near[session]
            rows = np.flatnonzero(whole)
            prompt, output = self._contexts(
                [part[rows] for part in said],
                [part[rows] for part in answered],
                (np.cumsum(whole) - 1)[first][session[rows]],
                c.system_prompt_tokens,
            )
            fits = (prompt + output <= c.max_context_tokens) & (arrival[rows] >= 0)
            fitting = np.flatnonzero(fits & (arrival[rows] <= until_s))
            fitting = fitting[_earliest(arrival[rows[fitting]], num)]
            keep = rows[fitting]
            if len(keep) == num:
                break
        if len(keep) < num:
            if spare > _MAX_SPARE:
                raise WorkloadError(
                    f"next to no turn fits max_context_tokens ({c.max_context_tokens}) beside "
                    f"system_prompt_tokens ({c.system_prompt_tokens}): raise it, or make prompt "
                    "and output shorter"
                )
            return self._conversations(rng, num, rate, c, 2.0 * spare)
        after = _turn_before(session[keep]) if c.wait_for_answers else np.full(num, BY_ITSELF)
        salt = int(rng.integers(1, 1 << 40))
        keys = np.empty((num, 2), np.int64)
        keys[:, 0] = 1 + system[session[keep]]
        keys[:, 1] = (salt << 20) + session[keep]
        ends = np.empty((num, 2), np.int32)
        ends[:, 0] = c.system_prompt_tokens
        ends[:, 1] = np.iinfo(np.int32).max
        return RequestTable.build(
            arrival[keep],
            prompt[fitting],
            output[fitting],
            session=session[keep],
            after=after,
            delay_s=np.where(after == BY_ITSELF, 0.0, gaps[keep]),
            prefix_offsets=2 * np.arange(num + 1),
            prefix_keys=keys.ravel(),
            prefix_ends=ends.ravel(),
        )

    def _contexts(
        self, said: list[FloatArray], answered: list[FloatArray], first: IntArray, before_all: int
    ) -> tuple[IntArray, IntArray]:
        """Prompts, with all turns before, and outputs of turns.

        Args:
            said: What the users' lengths are made of, see `Lengths.numbers`.
            answered: The same of the answers.
            first: First turn of the conversation of each, among these, `int64[n]`.
            before_all: Tokens of the system prompts.
        """
        text, output = self.prompt.lengths(said), self.output.lengths(answered)
        before = np.cumsum(text + output) - (text + output)
        return before_all + before - before[first] + text, output


def _by_then(arrival_s: FloatArray, num: int) -> float:
    """When `num` have come from time 0 on; infinite if so many do not come."""
    later = arrival_s[arrival_s >= 0]
    return float(np.partition(later, num - 1)[num - 1]) if len(later) > num else math.inf


def _earliest(arrival_s: FloatArray, num: int) -> IntArray:
    """Find the `num` earliest (all, if there are fewer), in order; equal ones as they stand."""
    if len(arrival_s) <= num:
        return np.argsort(arrival_s, kind="stable")
    # most turns of the conversations that were begun come later: they need not be sorted
    last_s = np.partition(arrival_s, num - 1)[num - 1]
    early = np.flatnonzero(arrival_s <= last_s)
    return early[np.argsort(arrival_s[early], kind="stable")][:num]


def _turn_before(session: IntArray) -> IntArray:
    """Find the row with the same conversation before each row, `BY_ITSELF` if there is none."""
    together = np.argsort(session, kind="stable")
    same = session[together[1:]] == session[together[:-1]]
    before = np.full(len(session), BY_ITSELF)
    before[together[1:][same]] = together[:-1][same]
    return before


class TraceConfig(Workload):
    """A replayed trace; each seed plays another window of it, `num_requests` in a row.

    `rate_rps` is the rate at load 1; without it the trace keeps its own. `time_unit` and
    `hash_block_tokens` say what the numbers count where the file's columns do not. Requests beyond
    `max_context_tokens`, or beyond what the largest replica holds, are refused unless `too_long`
    says otherwise. Where a trace says what followed what, requests wait for the answers
    they followed (a closed loop) unless `wait_for_answers` is off.
    """

    kind: Literal["trace"] = "trace"
    path: str
    rate_rps: float | None = Field(None, gt=0)
    max_context_tokens: int = Field(MAX_CONTEXT_TOKENS, ge=2)
    on_bad_row: OnBadRow = "error"
    time_unit: TimeUnit | None = None
    hash_block_tokens: int | None = Field(None, ge=1)
    too_long: TooLong = "error"
    wait_for_answers: bool = True

    @property
    def pace(self) -> str:
        """What load 1 means."""
        return "as recorded" if self.rate_rps is None else f"{self.rate_rps:g}/s"

    def whole(self) -> RequestTable:
        """Return the whole trace, as fast as it was."""
        return self.read().table

    def read(self) -> Trace:
        """Read the trace; it says what was left out, cut or concluded."""
        path = Path(self.path)
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        version = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return _trace(self.model_copy(update={"rate_rps": None}), version)

    @property
    def is_batch(self) -> bool:
        """Whether all requests arrive at one time, so that there is no rate."""
        return self.read().sessions is None and not np.isfinite(self.whole().rate_rps)

    def _draw(
        self, rng: np.random.Generator, num_requests: int, load: float
    ) -> tuple[RequestTable, BoolArray | None]:
        sessions = self.read().sessions
        if sessions is not None:
            if self.rate_rps is None:
                raise WorkloadError(
                    f"{self.path} holds sessions without a common time: say with rate_rps how many"
                    " calls there are per second"
                )
            return sessions.stream(rng, num_requests, self.rate_rps * load), None
        part, rows, _ = self._window(rng, num_requests, load)
        return part, self.read().class_given[rows]

    def num_cut_off(self, rng: np.random.Generator, *, num_requests: int, load: float = 1.0) -> int:
        """Count the requests of a window that wait for one before it, and so come by themselves.

        Recorded sessions have no windows.
        """
        if self.read().sessions is not None:
            return 0
        return self._window(rng, num_requests, load)[2]

    def _window(
        self, rng: np.random.Generator, num_requests: int, load: float
    ) -> tuple[RequestTable, IntArray, int]:
        """Take a window; also its rows of the trace, and how many have lost whom they wait for."""
        whole = self.whole()
        if self.rate_rps and self.is_batch:
            raise WorkloadError(
                f"{self.path} cannot be played at rate_rps {self.rate_rps:g}: all of its requests "
                "arrive at one time; leave rate_rps out"
            )
        num = min(num_requests, len(whole))
        first = int(rng.integers(0, len(whole) - num + 1))
        rows = np.arange(first, first + num)
        factor = load * (self.rate_rps / whole.rate_rps if self.rate_rps else 1.0)
        if not (whole.after >= 0).any():
            part = whole.take(rows)
            part = replace(part, arrival_s=part.arrival_s - part.arrival_s[0]).scaled(factor)
            return part, rows, 0
        # what is a window depends on the rate: chains overlap more, the faster they begin
        order, _ = whole.order_at(factor)
        assert order is not None
        faster = whole.scaled(factor)
        waits_for = faster.after[rows]
        part = faster.take(rows)
        part = replace(part, arrival_s=part.arrival_s - part.arrival_s[0])
        return part, order[rows], int(((waits_for >= 0) & (waits_for < first)).sum())


@lru_cache(maxsize=8)
def _trace(config: TraceConfig, version: tuple[tuple[int, int], ...]) -> Trace:
    """Read a trace once for each `version` (sizes and times of change) of its files."""
    return read_trace(
        config.path,
        on_bad_row=config.on_bad_row,
        time_unit=config.time_unit,
        hash_block_tokens=config.hash_block_tokens,
        max_context_tokens=config.max_context_tokens,
        too_long=config.too_long,
        wait_for_answers=config.wait_for_answers,
    )


WorkloadConfig = Annotated[
    GeneratedConfig | ClientsConfig | AgentsConfig | TraceConfig, Field(discriminator="kind")
]
