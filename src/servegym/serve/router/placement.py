"""What the one who carries a request's bytes asks of the one who decides about it.

Both may be one process (`desk`), or the bytes are carried by workers that ask over a socket
(`workers.remote`). Whoever carries does not know which it is.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from servegym.serve.requests.prompt import Prompt, Size
from servegym.serve.router.explanation import Explanation
from servegym.serve.router.reply import Reply
from servegym.serve.router.upstream import UpstreamError


class Arrival(NamedTuple):
    """A request whose body has been read.

    Attributes:
        prompt: Its prompt, read; or how long it is, where that is all there is to it.
        model: That it asks for; empty if none is named.
        max_tokens: What the client allows, `None` if it does not say.
        stream: Whether it wants a stream.
        slo_class: Name of the service level that it asks for; `None`: its tenant's.
        session: Name of its conversation, if it gives one.
        read_s: When the body was there, on the clock that all processes of a machine share.
        traced: Whether decisions about it are to be explained.
        divisible: Whether one replica can prefill it and another decode it.
    """

    prompt: Prompt | Size
    model: str
    max_tokens: int | None
    stream: bool
    slo_class: str | None
    session: str | None
    read_s: float
    traced: bool = False
    divisible: bool = False


class Apart(NamedTuple):
    """A part of a request that two replicas do.

    Attributes:
        step: What the one does that the seat is at: `prefill`, after which it is to be placed
            again; `decode`, after that; or `both`: to decode, while the other prefills.
        name: Of the replica that prefills.
        url: Of that.
        bootstrap_port: Of that, where it is an SGLang server.
    """

    step: Literal["prefill", "decode", "both"]
    name: str
    url: str
    bootstrap_port: int = 0


class Seat(NamedTuple):
    """Where a request has been placed.

    Attributes:
        name: Of the replica.
        url: Of the replica.
        dispatch_s: When it was placed there.
        first_token_s: How long the answer may take to begin, seconds; `None`: as long as it wants.
        slo_class: Index of the request's service level.
        predicted_output_tokens: Of the request.
        apart: What the replica does of it, if not all.
    """

    name: str
    url: str
    dispatch_s: float
    first_token_s: float | None
    slo_class: int
    predicted_output_tokens: float
    apart: Apart | None = None


class Ending(NamedTuple):
    """How an answer that had begun has come to its end.

    Attributes:
        status: HTTP status of the replica.
        broken: Whether it broke off.
        failed: Whether the engine reported an error in it.
        prompt_tokens: As the engine reports, if it does.
        cached_tokens: As the engine reports, if it does.
        output_tokens: As the engine reports, else as counted.
    """

    status: int
    broken: bool
    failed: bool
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int


class Placement(Protocol):
    """One request, from its admission until it leaves."""

    async def admitted(self) -> None:
        """Wait until it is known whether the request is admitted.

        Raises:
            RequestError: If it is not.
        """

    def arrive(self, arrival: Arrival) -> None:
        """The body has been read.

        Raises:
            RequestError: If the request cannot be served; it may as well come from `place`.
        """

    async def place(self) -> Seat:
        """Decide where it goes; hold it as long as the policy wants or none is up.

        Raises:
            RequestError: If it is rejected, or no replica takes it in time.
        """

    def explained(self) -> list[Explanation]:
        """Return the decisions since the last call, with their reasons, if it is traced."""

    async def failed(self, error: UpstreamError) -> bool:
        """A replica has failed it before its answer began; return whether to place it again."""

    def begin(self) -> None:
        """The first token of a stream has come."""

    def tokens(self, count: int, now_s: float) -> None:
        """So many more output tokens have come."""

    def paused(self, now_s: float) -> None:
        """The client takes no more of a stream that has begun."""

    def resumed(self, now_s: float) -> None:
        """The client takes more again."""

    def answered(self) -> None:
        """The client has the whole answer, which has not come to its end yet."""

    def broke(self, cause: str, token_s: float, status: int) -> None:
        """The answer broke off; `close` follows.

        Args:
            cause: `broken`, `cut`, `stall` or `error_event`.
            token_s: When its last token came.
            status: That the replica's error names.
        """

    def close(self, ending: Ending) -> None:
        """The answer has come to its end, good or not."""

    def end(self, status: str) -> None:
        """It will not get its answer; does nothing once it has ended.

        Args:
            status: `cancelled`, `failed` or `refused`.
        """

    def leave(self) -> None:
        """Its client has been told all there is; what has not ended has failed."""


class MovingPlacement(Placement, Protocol):
    """One that may be placed elsewhere while it waits for its first token."""

    async def move_on(self) -> Seat | None:
        """Place it elsewhere if that is better now; `None`: it stays.

        Raises:
            RequestError: If the router fails it.
        """


class DividedPlacement(Placement, Protocol):
    """One that two replicas may do."""

    async def prefilled(self, cached_tokens: int | None) -> Seat:
        """The replica has prefilled it, where it is seated for that; decide where it decodes.

        Args:
            cached_tokens: Prompt tokens that the replica found cached, as it reports, if it does.

        Raises:
            RequestError: If no replica takes it in time.
        """

    def prefilled_beside(self) -> None:
        """The other replica has prefilled it, while it is seated where it decodes."""


class Desk(Protocol):
    """Whoever decides about requests and knows the fleet."""

    def enter(self, tenant: str, key: str) -> Placement:
        """Begin with a request; every placement must `leave`."""

    def count(self, endpoint: str, status: int) -> None:
        """A client has been answered."""

    async def page(self, path: str) -> Reply:
        """Return what a path shows of the fleet.

        Raises:
            RequestError: If it shows nothing.
        """
