"""The replicas of a router, which may come and go while it runs.

One table, and several sources: the router's file, a file of replicas, discovery, operators. Each
source names the replicas that it knows, all of them at once; operators name one at a time. A
replica that is taken out gets no more requests, and is gone when its last one has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from servegym.errors import ConfigError, unknown_name
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.facts import kv_tokens_per_s, replica_facts
from servegym.serve.monitoring.poller import MetricsPoller
from servegym.serve.router.desk import LocalDesk
from servegym.serve.router.health import Health
from servegym.serve.router.replica import ReplicaConfig
from servegym.serve.router.telemetry import Telemetry
from servegym.typing import FloatArray

_log = logging.getLogger(__name__)

#: The source that is the router's own file, and the one that is whoever asks for it.
CONFIGURED = "replicas"
OPERATOR = "operator"
#: Seconds between two looks whether those that leave have lost their last request.
_LOOK_S = 0.1


class TakenError(ConfigError):
    """Raised when a replica has the name or the url of another."""


@dataclass(frozen=True)
class Member:
    """A replica of the fleet.

    Attributes:
        slot: By which the dispatcher knows it.
        replica: As configured.
        source: Where it comes from.
    """

    slot: int
    replica: ReplicaConfig
    source: str


class Fleet:
    """The table of replicas, and the only place where it changes.

    Args:
        configured: Those of the router's file; the dispatcher has them, in the slots 0, 1, ...
        dispatcher: Decides among them.
        health: Checks them.
        poller: Asks for their metrics.
        desk: Tells where they are.
        telemetry: Forgets what has gone.
        check: Raises a `ConfigError` of a replica that cannot be of this fleet; `None`: any can.
    """

    def __init__(
        self,
        configured: Iterable[ReplicaConfig],
        dispatcher: Dispatcher,
        health: Health,
        poller: MetricsPoller,
        desk: LocalDesk,
        telemetry: Telemetry,
        check: Callable[[ReplicaConfig], None] | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._health = health
        self._poller = poller
        self._desk = desk
        self._telemetry = telemetry
        self._check = check
        self._members: dict[str, Member] = {}
        self._leaving: list[Member] = []
        self._waiting: asyncio.Task[None] | None = None
        self._complaints: dict[str, set[str]] = {}  # by source, so that each is said once
        for slot, replica in enumerate(configured):
            self._settle(Member(slot, replica, CONFIGURED))

    def __iter__(self) -> Iterator[Member]:
        """Go through the replicas, without those that leave."""
        return iter(sorted(self._members.values(), key=lambda member: member.slot))

    def __len__(self) -> int:
        """Return how many there are, without those that leave."""
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        """Whether there is a replica of that name."""
        return name in self._members

    def __getitem__(self, name: str) -> Member:
        """Return a replica by its name.

        Raises:
            ConfigError: If there is none.
        """
        if name not in self._members:
            raise ConfigError(unknown_name("replica", name, self._members))
        return self._members[name]

    @property
    def leaving(self) -> Sequence[Member]:
        """Those that have left but for their last requests."""
        return tuple(self._leaving)

    async def add(self, replica: ReplicaConfig) -> Member:
        """An operator adds a replica: down, until a check is good.

        Raises:
            ConfigError: If its hardware is not known, or it cannot be of this fleet.
            TakenError: If its name or url is another's.
        """
        facts = await asyncio.to_thread(self._facts, replica)
        return self._join(replica, facts, OPERATOR)

    def remove(self, name: str) -> Member:
        """Take a replica out: it gets no more requests, and is gone after its last one.

        Raises:
            ConfigError: If there is none of that name.
        """
        member = self[name]
        self._leave(member)
        return member

    async def sync(self, source: str, replicas: Sequence[ReplicaConfig]) -> None:
        """Make the replicas of a source those that it names now.

        Those of other names join, those no longer named leave. One that is named with another url
        or role is another one; one with other hardware is known better. Whoever has the name or
        url of another source's replica stays out, which is said.

        Args:
            source: For the log.
            replicas: All that it names.

        Raises:
            ConfigError: If the hardware of one is not known, or it cannot be of this fleet; nothing
                has changed then.
        """
        facts = await asyncio.to_thread(
            lambda: {replica.name: self._facts(replica) for replica in replicas}
        )
        named = {replica.name: replica for replica in replicas}
        for member in [m for m in self if m.source == source]:
            found = named.get(member.replica.name)
            if found is None or (found.place, found.role) != (
                member.replica.place,
                member.replica.role,
            ):
                self._leave(member)
            elif found != member.replica:
                self._learn(member, found, facts[found.name])
        complaints: set[str] = set()
        for replica in replicas:
            known = self._members.get(replica.name)
            if known is None or known.source != source:
                try:
                    self._join(replica, facts[replica.name], source)
                except TakenError as error:
                    complaints.add(str(error))
        for complaint in sorted(complaints - self._complaints.get(source, set())):
            _log.error("%s: %s", source, complaint)
        self._complaints[source] = complaints

    async def stop(self) -> None:
        """Wait no longer for requests of those that leave."""
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)

    def _facts(self, replica: ReplicaConfig) -> FloatArray:
        if self._check is not None:
            self._check(replica)
        return replica_facts(replica.facts)

    def _join(self, replica: ReplicaConfig, facts: FloatArray, source: str) -> Member:
        for other in self:
            if other.replica.name == replica.name:
                raise TakenError(
                    f"there is a replica {replica.name} already, at {other.replica.shown_url} "
                    f"(from {other.source}): give the new one another name"
                )
            if other.replica.place == replica.place:
                raise TakenError(
                    f"{replica.name} has the url of {other.replica.name} (from {other.source}), "
                    f"{replica.shown_url}: its load would be counted as that of two"
                )
        member = Member(self._dispatcher.add(replica.name, facts), replica, source)
        self._settle(member)
        _log.warning("%s joins, at %s (from %s)", replica.name, replica.shown_url, source)
        return member

    def _settle(self, member: Member) -> None:
        slot, replica = member.slot, member.replica
        self._members[replica.name] = member
        self._desk.add(slot, replica.url)
        self._desk.bootstrap_ports[slot] = replica.bootstrap_port
        rate = kv_tokens_per_s(replica.facts)
        self._dispatcher.placing.set_role(slot, replica.role, rate)
        self._poller.add(slot, replica.metrics_page)
        self._health.add(slot, replica.url)

    def _learn(self, member: Member, replica: ReplicaConfig, facts: FloatArray) -> None:
        """A replica is the same, and described otherwise."""
        self._dispatcher.state.set_facts(member.slot, facts)
        self._desk.bootstrap_ports[member.slot] = replica.bootstrap_port
        rate = kv_tokens_per_s(replica.facts)
        self._dispatcher.placing.set_role(member.slot, replica.role, rate)
        if replica.metrics_page != member.replica.metrics_page:
            self._poller.remove(member.slot)
            self._poller.add(member.slot, replica.metrics_page)
        self._members[replica.name] = Member(member.slot, replica, member.source)
        _log.warning("%s is described otherwise (by %s)", replica.name, member.source)

    def _leave(self, member: Member) -> None:
        name, slot = member.replica.name, member.slot
        del self._members[name]
        self._leaving.append(member)
        self._health.leave(slot)
        left = self._dispatcher.state.outstanding(slot)
        _log.warning("%s leaves, with %d requests in progress", name, left)
        self._let_go()
        if self._leaving and (self._waiting is None or self._waiting.done()):
            self._waiting = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        while self._leaving:
            await asyncio.sleep(_LOOK_S)
            self._let_go()

    def _let_go(self) -> None:
        """Free the slots of those that have no request left."""
        for member in self._leaving.copy():
            slot, name = member.slot, member.replica.name
            is_idle = self._health.is_idle(slot) and not self._dispatcher.state.outstanding(slot)
            if not is_idle or self._dispatcher.placing.transfers.is_holding(slot):
                continue
            self._leaving.remove(member)
            for part in (self._desk, self._poller, self._health, self._dispatcher):
                part.remove(slot)
            others = (other.replica.name for other in self._leaving)
            if name not in self._members and name not in others:
                self._telemetry.forget(name)
            _log.warning("%s has gone", name)
