"""The carrying end of a request: what is asked and told the decider about it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from servegym.serve.router.disaggregation import PrefillError
from servegym.serve.router.errors import RequestError
from servegym.serve.router.explanation import Explanation
from servegym.serve.router.placement import Arrival, Ending, Seat
from servegym.serve.router.upstream import UpstreamError
from servegym.serve.router.workers.frames import Kind, pack, pack_arrival
from servegym.serve.router.workers.link import Link

if TYPE_CHECKING:
    from servegym.serve.router.workers.remote import RemoteDesk


class RemotePlacement:
    """One request; see `MovingPlacement` and `DividedPlacement`.

    Args:
        desk: That it is at.
        link: To the decider that it is booked at.
        ticket: Its number there.
    """

    __slots__ = (
        "_arrival",
        "_desk",
        "_explained",
        "_gone",
        "_link",
        "_refused",
        "_said",
        "_status",
        "_ticket",
    )

    def __init__(self, desk: RemoteDesk, link: Link, ticket: int) -> None:
        self._desk = desk
        self._link = link
        self._ticket = ticket
        self._arrival: bytes | None = None  # until the decider has it
        self._explained: list[Explanation] = []
        self._said: asyncio.Future[Any] | None = None  # what is waited for
        self._refused: RequestError | None = None
        self._status = "failed"
        self._gone = False

    def told(self, what: Any) -> None:
        """The decider has answered."""
        if self._said is not None and not self._said.done():
            self._said.set_result(what)

    def learn(self, explained: list[Explanation]) -> None:
        """The decider has said why it has decided so."""
        self._explained += explained

    def refuse(self, error: RequestError) -> None:
        """The decider has refused it, or has gone: it is in no books any more."""
        self._refused = error
        self._gone = True
        if self._said is not None and not self._said.done():
            self._said.set_exception(error)

    async def admitted(self) -> None:
        """See `Placement`."""
        await self._ask(Kind.ADMIT)

    def arrive(self, arrival: Arrival) -> None:
        """See `Placement`."""
        self._arrival = pack_arrival(arrival, content=self._desk.follows)

    async def place(self) -> Seat:
        """See `Placement`."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            explained, *seat = await self._ask(Kind.ARRIVE, arrival)
        else:
            explained, *seat = await self._ask(Kind.PLACE)
        self.learn(explained)
        return Seat(*seat)

    def explained(self) -> list[Explanation]:
        """See `Placement`."""
        explained, self._explained = self._explained, []
        return explained

    async def failed(self, error: UpstreamError) -> bool:
        """See `Placement`; once the decider has gone nobody can place it again."""
        if self._link.lost:
            return False
        refusal = error.refusal
        if refusal is not None:  # what it says is for the client
            refusal = refusal._replace(body=b"")
        is_prefill = isinstance(error, PrefillError)
        (again,) = await self._ask(Kind.FAILED, pack(is_prefill, error.cause, refusal))
        return bool(again)

    async def move_on(self) -> Seat | None:
        """See `MovingPlacement`; once the decider has gone it stays where it is."""
        if self._link.lost:
            return None
        try:
            (seat,) = await self._ask(Kind.MOVE)
        except RequestError:
            if self._link.lost:
                return None
            raise
        return cast("Seat | None", seat)

    async def prefilled(self, cached_tokens: int | None) -> Seat:
        """See `DividedPlacement`."""
        explained, *seat = await self._ask(Kind.PREFILLED, pack(cached_tokens))
        self.learn(explained)
        return Seat(*seat)

    def prefilled_beside(self) -> None:
        """See `DividedPlacement`."""
        self._link.send(Kind.PREFILLED_BESIDE, self._ticket)

    def begin(self) -> None:
        """See `Placement`."""
        self._link.send(Kind.BEGIN, self._ticket)

    def tokens(self, count: int, now_s: float) -> None:
        """See `Placement`."""
        self._link.put_tokens(self._ticket, count, now_s)

    def paused(self, now_s: float) -> None:
        """See `Placement`."""
        self._link.send(Kind.PAUSED, self._ticket, pack(now_s))

    def resumed(self, now_s: float) -> None:
        """See `Placement`."""
        self._link.send(Kind.RESUMED, self._ticket, pack(now_s))

    def answered(self) -> None:
        """See `Placement`."""
        if self._desk.follows:
            self._link.send(Kind.ANSWERED, self._ticket)

    def broke(self, cause: str, token_s: float, status: int) -> None:
        """See `Placement`."""
        self._link.put(Kind.BROKE, self._ticket, pack(cause, token_s, status))

    def close(self, ending: Ending) -> None:
        """See `Placement`; it leaves the books with that."""
        self._link.send(Kind.CLOSE, self._ticket, pack(*ending))
        self._gone = True

    def end(self, status: str) -> None:
        """See `Placement`; the decider is told when it leaves."""
        if self._status == "failed":
            self._status = status

    def leave(self) -> None:
        """See `Placement`."""
        self._desk.forget(self._ticket)
        if not self._gone:
            self._gone = True
            self._link.send(Kind.LEAVE, self._ticket, pack(self._status))

    async def _ask(self, kind: Kind, body: bytes = b"") -> Any:
        """Say something and wait for the answer.

        Raises:
            RequestError: If the request is refused.
        """
        if self._refused is None and self._link.lost:
            self._refused = self._desk.away()
        if self._refused is not None:
            raise self._refused
        self._said = asyncio.get_running_loop().create_future()
        self._link.send(kind, self._ticket, body)
        try:
            return await self._said
        finally:
            self._said = None
