"""A request inside a replica, and who is told of its progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


class Status(IntEnum):
    """Where a request is; one that was preempted waits until its next token."""

    NEW, WAITING, RUNNING, FINISHED, ABORTED = range(5)


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One request inside a replica; `output_tokens` is how many it will have.

    Attributes:
        request_id: Name for messages.
        prompt_tokens: Tokens of the prompt.
        output_tokens: Tokens it ends after.
        identity: Names the content of the request's KV block by its index.
        priority: Lower is more urgent.
        finish_reason: Why it will end: `stop` by itself, `length` at its limit.
        arrival_s: When the replica got it.
        first_scheduled_s: First admission, NaN before.
        first_token_s: First token, NaN before.
        last_token_s: End of the step of its newest token before it began to decode.
        cached_tokens: Prefix tokens found at the first admission, -1 before.
        num_preemptions: How often it was preempted.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    identity: Callable[[int], int]
    priority: int = 0
    finish_reason: str = "length"
    status: Status = Status.NEW
    arrival_s: float = math.nan
    first_scheduled_s: float = math.nan
    first_token_s: float = math.nan
    last_token_s: float = math.nan
    cached_tokens: int = -1
    num_preemptions: int = 0
    _place: int = -1  # in the replica's core
    _generated: int = 0  # while decoding: as of step `_joined`
    _joined: int = -1  # steps the replica had ended when decoding began, -1: does not decode


class Observer(Protocol):
    """What a replica reports to."""

    def admitted(self, request: EngineRequest, now_s: float) -> None:
        """Note a first admission."""

    def preempted(self, request: EngineRequest, now_s: float) -> None:
        """Note that a request was preempted."""

    def emitted(self, request: EngineRequest, now_s: float) -> None:
        """Note the token at the end of a prefill, before it is counted as its last."""

    def finished(self, request: EngineRequest, now_s: float) -> None:
        """Note the end of a request."""

    def decoded(self, gap_s: float, count: int) -> None:
        """Note that of `count` decoding requests a token came out, `gap_s` after the one before."""
