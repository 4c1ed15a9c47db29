"""A request from its arrival at a dispatcher to its end, with what the log will say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from servegym.serve.live_request import LiveRequest
from servegym.serve.placing import Prefill
from servegym.serve.requests.prompt import Prompt
from servegym.serve.requests.recent_ends import Mark
from servegym.serve.transfers import Moving
from servegym.workloads.followed import Followed


@dataclass(slots=True, eq=False)
class Job:
    """A request from its arrival to its end.

    Attributes:
        request: Its place in the state.
        prompt: Its prompt, measured.
        tenant: Who asks.
        model: For the log.
        wall_s: When it arrived, in seconds since 1970.
        decisions: Rows of the log.
        num_retries: How often it was taken back from a replica.
        first_dispatch_s: When it first went to a replica, on the dispatcher's clock; NaN before.
        cached_tokens: Prompt tokens found cached, as the engine reports them.
        reported_prompt_tokens: Length of its prompt, as the engine reports it.
        follows: The answered request that it came after, for the log.
        mark: What those that follow it will know it by, until it has been answered.
        held_s: Seconds that it has been on hold.
        moving: It between the replica that prefills it and the one where it decodes.
        prefill: Where and when it was prefilled last, if not where it decodes.
        placements: Decisions where it decodes, for the log.
        ended: Whether its books are closed.
    """

    request: LiveRequest
    prompt: Prompt
    tenant: str
    model: str
    wall_s: float
    decisions: list[dict[str, Any]] = field(default_factory=list)
    num_retries: int = 0
    first_dispatch_s: float = math.nan
    cached_tokens: int | None = None
    reported_prompt_tokens: int | None = None
    follows: Followed | None = None
    mark: Mark | None = None
    held_s: float = 0.0
    moving: Moving | None = None
    prefill: Prefill | None = None
    placements: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False

    @property
    def replica(self) -> int:
        """Slot of the replica where it is, if only to be prefilled; -1: nowhere."""
        if self.request.replica < 0 and self.moving is not None:
            return self.moving.source
        return self.request.replica
