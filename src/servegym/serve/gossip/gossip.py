"""Telling other routers what this one has at the replicas, and counting what they have.

Placements are not told: whose blocks a replica has cached each router knows of its own requests.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections import Counter

import numpy as np

from servegym.errors import ConfigError
from servegym.serve.discovery.found import place
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.gossip.config import PeersConfig, read_secret, split
from servegym.serve.gossip.datagrams import (
    MAX_BYTES,
    PART_BITS,
    BadDatagramError,
    Head,
    entries_of,
    key_of,
    read,
    write,
)
from servegym.serve.gossip.peer import Peer, round_of
from servegym.serve.monitoring.prometheus import Exposition
from servegym.serve.state import COUNTED

_log = logging.getLogger(__name__)

#: Datagrams that are read before requests have their turn again.
_MAX_AT_ONCE = 256
#: Of the socket, bytes each way: a round of many routers with many replicas comes at once.
_BUFFER_BYTES = 1 << 20
_REASONS = ("garbage", "version", "secret", "unknown", "replayed")

Address = tuple[str, int]


class Gossip:
    """Keeps a dispatcher's state and those of others in step.

    Args:
        config: Who the others are.
        dispatcher: Whose requests are told, and whose state counts those of others.

    Attributes:
        port: That it listens on, once started.
        num_sent: Datagrams sent.
        bad: Datagrams that did not count, by reason.

    Raises:
        ConfigError: If the secret is not set.
    """

    def __init__(self, config: PeersConfig, dispatcher: Dispatcher) -> None:
        self.config = config
        self.port = 0
        self.num_sent = 0
        self.bad: Counter[str] = Counter(dict.fromkeys(_REASONS, 0))
        self._secret = read_secret(config)
        self._dispatcher = dispatcher
        self._id = secrets.randbits(63) + 1
        self._round = 0
        self._sent_s: dict[int, float] = {}  # by round, of late
        self._peers: dict[Address, Peer] = {}
        self._names: list[str] = []
        self._slots: dict[int, list[int]] = {}  # by key
        self._socket: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._complaint = ""

    async def start(self) -> None:
        """Begin to tell and to listen.

        Raises:
            ConfigError: If the address cannot be listened on.
        """
        config = self.config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        one = socket.socket(family, socket.SOCK_DGRAM)
        try:
            one.setblocking(False)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                one.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
            one.bind((config.host, config.port))
        except OSError as error:
            one.close()
            raise ConfigError(
                f"peers cannot be heard at {place(config.host, config.port)} (UDP): "
                f"{error.strerror or error}"
            ) from error
        self._socket, self.port = one, int(one.getsockname()[1])
        await self._resolve()
        asyncio.get_running_loop().add_reader(one, self._hear)
        self._tasks = [asyncio.create_task(self._tell_on()), asyncio.create_task(self._look_on())]

    async def stop(self) -> None:
        """Say and hear nothing more; does nothing before the start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def status(self) -> list[dict[str, object]]:
        """Describe the others; a `silent` one counts as without requests."""
        now_s, since_s = self._dispatcher.clock(), self._since_s()
        return [
            {
                "address": place(*address),
                "silent": peer.heard_s < since_s,
                "age_s": now_s - peer.heard_s if np.isfinite(peer.heard_s) else None,
                "outstanding_requests": int(peer.counters(since_s)[0].sum()),
                "held_requests": peer.num_held if peer.heard_s >= since_s else 0,
                "arrival_rate_rps": peer.arrival_rate_rps if peer.heard_s >= since_s else 0.0,
            }
            for address, peer in sorted(self._peers.items())
        ]

    def write(self, page: Exposition) -> None:
        """Write what is known of the others onto a page."""
        now_s, since_s = self._dispatcher.clock(), self._since_s()
        named = [({"peer": place(*address)}, peer) for address, peer in sorted(self._peers.items())]
        page.gauges(
            "servegym_peer_silent",
            "1 if a router is not heard: its requests do not count",
            [(label, float(peer.heard_s < since_s)) for label, peer in named],
        )
        page.gauges(
            "servegym_peer_age_seconds",
            "Age of what a router said last, at most; +Inf before the first",
            [(label, now_s - peer.heard_s) for label, peer in named],
        )
        page.gauges(
            "servegym_peer_outstanding_requests",
            "Requests that a router has at the replicas",
            [(label, peer.counters(since_s)[0].sum()) for label, peer in named],
        )
        page.counter(
            "servegym_peer_datagrams",
            "Datagrams from other routers that counted",
            [(label, peer.num_taken) for label, peer in named],
        )
        page.counter(
            "servegym_peer_sent_datagrams", "Datagrams to other routers", [({}, self.num_sent)]
        )
        page.counter(
            "servegym_peer_bad_datagrams",
            "Datagrams that did not count, by reason",
            [({"reason": reason}, count) for reason, count in sorted(self.bad.items())],
        )

    def meet(self, addresses: set[Address]) -> None:
        """Those are the others now."""
        for address in set(self._peers) - addresses:
            del self._peers[address]
        for address in addresses - set(self._peers):
            self._peers[address] = Peer(len(self._names))

    def tell(self) -> list[tuple[bytes, Address]]:
        """Return the datagrams of a round, and to whom each goes."""
        self._follow_fleet()
        state, now_s = self._dispatcher.state, self._dispatcher.clock()
        self._round += 1
        self._sent_s[self._round] = now_s
        since_s = self._since_s()
        while self._sent_s[next(iter(self._sent_s))] < since_s:
            del self._sent_s[next(iter(self._sent_s))]
        own, keys = state.own(), list(self._slots)
        counters = np.zeros((len(COUNTED), len(keys)))
        for i, slots in enumerate(self._slots.values()):
            counters[:, i] = own[:, slots].sum(axis=1)
        pieces = entries_of(keys, counters)
        said = state.arrival_rate_rps, state.num_held
        datagrams = []
        for address, peer in self._peers.items():
            for part, piece in enumerate(pieces):
                sequence = self._round << PART_BITS | part
                head = Head(self._id, sequence, peer.sender, peer.sequence, *said)
                datagrams.append((write(head, piece, self._secret), address))
            if peer.stranger is not None:  # lets it show that it hears this
                sequence = self._round << PART_BITS | len(pieces)
                head = Head(self._id, sequence, *peer.stranger, *said)
                datagrams.append((write(head, b"", self._secret), address))
                peer.stranger = None
        return datagrams

    def take(self, data: bytes, address: Address) -> None:
        """Take a datagram in; what is wrong with it is counted."""
        try:
            said = read(data, self._secret)
        except BadDatagramError as error:
            self.bad[error.reason] += 1
            return
        head = said.head
        if head.sender == self._id:  # one's own name is among the addresses
            return
        peer = self._peers.get(address)
        if peer is None:
            self.bad["unknown"] += 1
            return
        self._follow_fleet()
        named = [self._slots.get(key, [-1]) for key in said.keys.tolist()]
        widths = [len(slots) for slots in named]
        slots = np.array([slot for slots in named for slot in slots], np.int64)
        if max(widths, default=1) > 1:  # one leaves, and one of its name has come
            said = said._replace(counters=np.repeat(said.counters, widths, axis=1))
        sent_s = self._sent_s.get(round_of(head.echo)) if head.addressee == self._id else None
        if sent_s is not None and sent_s < self._since_s():
            sent_s = None
        if peer.take(said, slots, sent_s) == "replayed":
            self.bad["replayed"] += 1

    def count(self) -> None:
        """Let the state know what the others have."""
        self._follow_fleet()
        since_s = self._since_s()
        total = np.zeros((len(COUNTED), self._dispatcher.state.num_slots))
        rate_rps, num_held = 0.0, 0
        for address, peer in self._peers.items():
            heard = peer.heard_s >= since_s
            if heard != peer.is_heard:
                peer.is_heard = heard
                what = "is heard" if heard else "is silent: its requests no longer count"
                _log.warning("the router at %s %s", place(*address), what)
            if heard:
                total += peer.counters(since_s)
                rate_rps += peer.arrival_rate_rps
                num_held += peer.num_held
        self._dispatcher.state.set_others(total, rate_rps, num_held)

    def _since_s(self) -> float:
        """Return the time before which nothing counts."""
        return self._dispatcher.clock() - self.config.forget_after_s

    def _follow_fleet(self) -> None:
        """Know the replicas that there are, by name."""
        names = self._dispatcher.names
        if names == self._names:
            return
        before = self._names
        moved = [
            slot if slot < len(before) and name and before[slot] == name else -1
            for slot, name in enumerate(names)
        ]
        for peer in self._peers.values():
            peer.move(np.array(moved, np.int64))
        self._names = list(names)
        self._slots = {}
        for slot in self._dispatcher.slots():
            self._slots.setdefault(key_of(names[slot]), []).append(slot)

    def _hear(self) -> None:
        assert self._socket is not None
        for _ in range(_MAX_AT_ONCE):
            try:
                data, address = self._socket.recvfrom(2 * MAX_BYTES)
            except OSError:  # nothing more, or word that nobody listens where one was sent
                break
            self.take(data, (str(address[0]), int(address[1])))
        self.count()

    async def _tell_on(self) -> None:
        while True:
            assert self._socket is not None
            for data, address in self.tell():
                try:
                    self._socket.sendto(data, address)
                    self.num_sent += 1
                except OSError:  # no room, or no way there: the next round says it all again
                    continue
            self.count()
            await asyncio.sleep(self.config.interval_s)

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(self.config.resolve_s)
            await self._resolve()

    async def _resolve(self) -> None:
        """Look up who the others are; who cannot be looked up stays."""
        assert self._socket is not None
        loop, found, complaints = asyncio.get_running_loop(), set[Address](), []
        for text in self.config.addresses:
            host, port = split(text)
            try:
                answers = await loop.getaddrinfo(
                    host, port, family=self._socket.family, type=socket.SOCK_DGRAM
                )
            except OSError as error:
                complaints.append(f"{text}: {error.strerror or error}")
            else:
                found |= {(str(address[0]), int(address[1])) for *_, address in answers}
        self.meet(found if not complaints else found | set(self._peers))
        complaint = "; ".join(complaints)
        if complaint and complaint != self._complaint:
            _log.error("peers cannot be looked up (%s); those that are known stay", complaint)
        self._complaint = complaint
