"""The deciding end: workers ask here, and one desk answers all of them.

Why one process decides: what a decision rests on (counters, prefix index, learners, guards,
standing of replicas, budgets, limits) changes with every request, is some megabytes of Python and
NumPy objects, and would have to be locked and shared whole for several to decide as one would. A
decision and its books take a fraction of what a request's bytes take (docs/live.md has numbers), so
one process keeps several workers busy, by the very code that a router of one process runs.

Why they place like one: a worker tells what has happened before its client can know, and packets
are taken in the order they were written, whichever worker wrote them. A request that a client sends
after an answer is decided with that answer booked, although another worker may carry it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from servegym.serve.monitoring.loop_lag import LAG_S
from servegym.serve.monitoring.prometheus import Histogram
from servegym.serve.requests.prompt import Prompt
from servegym.serve.router.auth import Keys
from servegym.serve.router.desk import LocalDesk
from servegym.serve.router.disaggregation import PrefillError
from servegym.serve.router.errors import RequestError
from servegym.serve.router.explanation import Explanation
from servegym.serve.router.local_placement import LocalPlacement
from servegym.serve.router.logs import REQUEST_ID
from servegym.serve.router.placement import Ending, Seat
from servegym.serve.router.split_placement import SplitPlacement
from servegym.serve.router.upstream import UpstreamError
from servegym.serve.router.workers.frames import (
    Frame,
    Kind,
    Packet,
    pack,
    token_records,
    unpack,
    unpack_arrival,
)
from servegym.serve.router.workers.link import Link

_log = logging.getLogger(__name__)

#: Between two looks whether all clients have gone, seconds.
_LOOK_S = 0.05


class Shared(NamedTuple):
    """What a decider has of the process that started it.

    Attributes:
        path: Where workers come, in a folder that only this user can open.
        port: For clients, who come to the workers.
        admin: Bound; for operators.
    """

    path: Path
    port: int
    admin: socket.socket


class _Worker:
    """One worker, as the decider sees it.

    Attributes:
        link: To it.
        pid: Of its process; 0 until it has said so.
        has_left: Whether its clients have gone, as they were let to.
        placements: Its requests, by ticket.
        holds: Those of them that wait for a place.
    """

    def __init__(self, connection: socket.socket, readable: Callable[[], None]) -> None:
        self.link = Link(connection, readable)
        self.pid = 0
        self.has_left = False
        self.placements: dict[int, LocalPlacement] = {}
        self.holds: dict[int, asyncio.Task[None]] = {}


class Decider:
    """Answers workers.

    Args:
        desk: Decides.
        keys: API keys that workers are to know; `None`: everyone may ask.

    Attributes:
        num_lost: Workers that have gone.
        lag: Of their event loops, seconds.
        loop: That it runs on.
    """

    def __init__(self, desk: LocalDesk, keys: Keys | None) -> None:
        self.num_lost = 0
        self.lag = Histogram(LAG_S)
        self._desk = desk
        self._keys = keys
        self._workers: list[_Worker] = []
        self._late: list[tuple[_Worker, Packet]] = []  # written after the last look had begun
        self._leaving = False
        self._listener: socket.socket | None = None
        self.loop = asyncio.get_running_loop()
        self._takes: dict[int, Callable[[_Worker, LocalPlacement, int, bytes], None]] = {
            Kind.ADMIT: self._admit,
            Kind.ARRIVE: self._arrive,
            Kind.PLACE: self._place,
            Kind.FAILED: self._failed,
            Kind.BEGIN: lambda _, placement, *__: placement.begin(),
            Kind.PAUSED: lambda _, placement, __, body: placement.paused(*unpack(body)),
            Kind.RESUMED: lambda _, placement, __, body: placement.resumed(*unpack(body)),
            Kind.ANSWERED: lambda _, placement, *__: placement.answered(),
            Kind.BROKE: lambda _, placement, __, body: placement.broke(*unpack(body)),
            Kind.CLOSE: self._close,
            Kind.LEAVE: self._leave,
            Kind.MOVE: self._move,
            Kind.PREFILLED: self._prefilled,
            Kind.PREFILLED_BESIDE: lambda _, placement, *__: _divided(placement).prefilled_beside(),
        }

    @property
    def workers(self) -> list[dict[str, int]]:
        """Process id and number of requests of every worker."""
        return [{"pid": w.pid, "requests": len(w.placements)} for w in self._workers if w.pid]

    def listen(self, path: Path) -> None:
        """Let workers come.

        Args:
            path: Of a socket, in a folder that only this user can open; what is left there of an
                earlier decider is removed.
        """
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(str(path))
        self._listener.listen()
        self.loop.add_reader(self._listener, self._meet)

    async def leave(self) -> None:
        """Let workers let their clients go, and return when these have gone."""
        self._leaving = True
        for worker in self._workers:
            worker.link.send(Kind.LEAVING)
        while not all(worker.has_left for worker in self._workers):
            await asyncio.sleep(_LOOK_S)

    def stop(self) -> None:
        """Hang up; what workers still have has failed."""
        if self._listener is not None:
            self.loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for worker in list(self._workers):
            worker.link.close()
            self._lose(worker)

    def tell_keys(self, keys: Keys | None) -> None:
        """Let all workers know other API keys."""
        self._keys = keys
        for worker in self._workers:
            worker.link.send(Kind.KEYS, 0, pack(keys))

    def _meet(self) -> None:
        """A worker has come."""
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        worker = _Worker(connection, self._look)
        self._workers.append(worker)
        worker.link.send(Kind.KEYS, 0, pack(self._keys))
        if self._leaving:
            worker.link.send(Kind.LEAVING)

    def _look(self) -> None:
        """Take in what workers have said, in the order they said it.

        What causes another thing was written before it, and so is here if that one is, unless it
        was written after this look had begun: what was waits for the next look.
        """
        begin_s = time.monotonic()
        said, self._late = self._late, []
        for worker in self._workers:
            said += [(worker, packet) for packet in worker.link.receive()]
        if len(said) > 1:
            said.sort(key=lambda one: one[1].written_s)
        for worker, packet in said:
            if packet.written_s > begin_s and not worker.link.lost:
                self._late.append((worker, packet))
                continue
            for frame in packet.frames:
                self._take(worker, frame)
        if self._late:
            self.loop.call_soon(self._look)
        for worker in [w for w in self._workers if w.link.lost]:
            self._lose(worker)
        for worker in self._workers:
            worker.link.flush()

    def _take(self, worker: _Worker, frame: Frame) -> None:
        """Take in one frame; what goes wrong with a request concerns no other."""
        kind, ticket, body = frame
        try:
            if kind == Kind.TOKENS:
                for one, count, now_s in token_records(body):
                    if (found := worker.placements.get(one)) is not None:
                        found.tokens(count, now_s)
            elif (placement := worker.placements.get(ticket)) is not None:
                self._takes[kind](worker, placement, ticket, body)
            elif kind == Kind.ENTER:
                worker.placements[ticket] = self._desk.enter(*unpack(body))
            elif kind == Kind.COUNT:
                for (endpoint, status), count in unpack(body)[0].items():
                    self._desk.count(endpoint, status, count)
            elif kind == Kind.LAG:
                self.lag.observe(*unpack(body))
            elif kind == Kind.PAGE:
                reply = self._desk.show(*unpack(body))
                worker.link.put(Kind.SHOWN, ticket, pack(reply.status, reply.body, reply.headers))
            elif kind == Kind.HELLO:
                (worker.pid,) = unpack(body)
            elif kind == Kind.LEFT:
                worker.has_left = True
        except Exception as error:
            self._refuse(worker, ticket, error)

    def _refuse(self, worker: _Worker, ticket: int, error: Exception) -> None:
        """Tell a worker what to tell a client."""
        placement = worker.placements.pop(ticket, None)
        if not isinstance(error, RequestError):
            before = REQUEST_ID.set(placement.key if placement else "")
            _log.error("a request failed in the router", exc_info=error)
            REQUEST_ID.reset(before)
            error = RequestError(500, "the router failed: its log says why", "internal_error")
        explained: list[Explanation] = []
        if placement is not None:
            explained = placement.explained()
            placement.leave()
        said = error.status, error.message, error.code, error.retry_after_s
        worker.link.put(Kind.REFUSED, ticket, pack(explained, *said))

    def _admit(self, worker: _Worker, placement: LocalPlacement, ticket: int, _: bytes) -> None:
        worker.link.put(Kind.ADMITTED, ticket)

    def _arrive(self, worker: _Worker, placement: LocalPlacement, ticket: int, body: bytes) -> None:
        arrival = unpack_arrival(body)
        if isinstance(arrival.prompt, Prompt):  # what is learnt about lengths is known here
            prompt = self._desk.dispatcher.reader.measured(arrival.prompt)
            arrival = arrival._replace(prompt=prompt)
        placement.arrive(arrival)
        self._place(worker, placement, ticket, b"")

    def _place(self, worker: _Worker, placement: LocalPlacement, ticket: int, _: bytes) -> None:
        found = placement.try_place()
        if isinstance(found, Seat):
            self._tell(worker, placement, ticket, found)
        else:
            self._hold(worker, placement, ticket, placement.hold(found))

    def _move(self, worker: _Worker, placement: LocalPlacement, ticket: int, _: bytes) -> None:
        worker.link.put(Kind.MOVED, ticket, pack(placement.try_move()))

    def _prefilled(
        self, worker: _Worker, placement: LocalPlacement, ticket: int, body: bytes
    ) -> None:
        divided = _divided(placement)
        divided.end_prefill(*unpack(body))
        seat = divided.try_decode()
        if seat is not None:
            self._tell(worker, placement, ticket, seat)
        else:
            self._hold(worker, placement, ticket, divided.hold_decode())

    def _hold(
        self,
        worker: _Worker,
        placement: LocalPlacement,
        ticket: int,
        waits: Coroutine[Any, Any, Seat],
    ) -> None:
        """Let a request wait until it has a place."""
        holding = self._tell_later(worker, placement, ticket, waits)
        worker.holds[ticket] = self.loop.create_task(holding)

    async def _tell_later(
        self,
        worker: _Worker,
        placement: LocalPlacement,
        ticket: int,
        waits: Coroutine[Any, Any, Seat],
    ) -> None:
        try:
            seat = await waits
        except Exception as error:
            self._refuse(worker, ticket, error)
        else:
            self._tell(worker, placement, ticket, seat)
        finally:
            worker.holds.pop(ticket, None)
        worker.link.flush()

    def _tell(self, worker: _Worker, placement: LocalPlacement, ticket: int, seat: Seat) -> None:
        """Say where a request has been placed, and why, if it is traced."""
        worker.link.put(Kind.PLACED, ticket, pack(placement.explained(), *seat))

    def _failed(self, worker: _Worker, placement: LocalPlacement, ticket: int, body: bytes) -> None:
        is_prefill, *error = unpack(body)
        again = placement.judge((PrefillError if is_prefill else UpstreamError)(*error))
        worker.link.put(Kind.VERDICT, ticket, pack(again))

    def _close(self, worker: _Worker, placement: LocalPlacement, ticket: int, body: bytes) -> None:
        del worker.placements[ticket]
        try:
            placement.close(Ending(*unpack(body)))
        finally:
            placement.leave()

    def _leave(self, worker: _Worker, placement: LocalPlacement, ticket: int, body: bytes) -> None:
        del worker.placements[ticket]
        if (holding := worker.holds.pop(ticket, None)) is not None:
            holding.cancel()
        placement.end(*unpack(body))
        placement.leave()

    def _lose(self, worker: _Worker) -> None:
        """A worker has gone: its clients have lost their answers, and replicas their requests."""
        self._workers.remove(worker)
        self.num_lost += 1
        if worker.placements:
            _log.warning("a worker has gone with %d requests", len(worker.placements))
        for holding in worker.holds.values():
            holding.cancel()
        for placement in worker.placements.values():
            placement.end("lost")
            placement.leave()
        worker.placements.clear()


def _divided(placement: LocalPlacement) -> SplitPlacement:
    """Return a placement that two replicas do: workers say nothing of parts of others."""
    assert isinstance(placement, SplitPlacement)
    return placement
