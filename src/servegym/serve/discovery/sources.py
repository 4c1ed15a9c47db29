"""All sources of a router's replicas, each followed by a task that tells the fleet."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol

from servegym.errors import ConfigError
from servegym.serve.discovery.config import DiscoverConfig
from servegym.serve.discovery.dns import DnsNames
from servegym.serve.discovery.found import Found, described
from servegym.serve.discovery.kubernetes import KubernetesPods
from servegym.serve.discovery.replicas_file import ReplicasFile
from servegym.serve.router.fleet import Fleet
from servegym.serve.router.replica import ReplicaConfig

_log = logging.getLogger(__name__)

#: How long a router waits at its start for what its sources know, seconds.
_FIRST_S = 5.0


class Source(Protocol):
    """Whoever finds replicas."""

    title: str

    def watch(self) -> AsyncGenerator[list[Found]]:
        """Yield all that are there, now and whenever that may have changed; never ends."""


def sources(discover: DiscoverConfig) -> list[Source]:
    """Make the sources that a configuration names."""
    found: list[Source] = [DnsNames(config) for config in discover.dns]
    return found + [KubernetesPods(config) for config in discover.kubernetes]


async def first_look(discover: DiscoverConfig) -> tuple[list[ReplicaConfig], list[str]]:
    """Ask every source once, as long as a router waits for it at its start.

    Returns:
        The replicas that they name now, and one sentence for each thing that is wrong; why a source
        has named none is in the log.
    """

    async def ask(source: Source) -> list[Found] | None:
        async with aclosing(source.watch()) as lists:
            try:
                async with asyncio.timeout(_FIRST_S):
                    return await anext(lists)
            except TimeoutError:
                return None

    asked = sources(discover)
    replicas: list[ReplicaConfig] = []
    wrong: list[str] = []
    answers = await asyncio.gather(*map(ask, asked))
    for source, found in zip(asked, answers, strict=True):
        if found is None:
            wrong.append(f"{source.title} has named no replicas in {_FIRST_S:g} s")
            continue
        named, complaints = described(found, discover.templates)
        replicas += named
        wrong += [f"{source.title}: {complaint}" for complaint in complaints]
    return replicas, wrong


class Sources:
    """Follows the sources of a fleet.

    Args:
        fleet: Told what they know.
        file: A file of replicas, if there is one.
        discover: How others are found, if they are.
    """

    def __init__(
        self, fleet: Fleet, file: ReplicasFile | None, discover: DiscoverConfig | None
    ) -> None:
        self._fleet = fleet
        self._file = file
        self._discover = discover
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Follow them from now on; what they know at once is in the fleet before this returns."""
        firsts: list[asyncio.Event] = []
        if self._file is not None:
            firsts.append(self._follow(self._file.title, self._file.watch()))
        if self._discover is not None:
            firsts += [
                self._follow(source.title, self._describe(source))
                for source in sources(self._discover)
            ]
        if not firsts:
            return
        waiting = [asyncio.create_task(first.wait()) for first in firsts]
        _, late = await asyncio.wait(waiting, timeout=_FIRST_S)
        for task in late:
            task.cancel()
        if late:
            _log.warning("%d of %d sources have named no replicas yet", len(late), len(firsts))

    async def stop(self) -> None:
        """Follow them no longer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def read_anew(self) -> None:
        """Read the file of replicas anew, if there is one."""
        if self._file is not None:
            self._file.read_anew()

    def _follow(self, title: str, lists: AsyncIterator[Sequence[ReplicaConfig]]) -> asyncio.Event:
        """Begin to tell the fleet; return what is set when it has been told once."""
        first = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._tell(title, lists, first)))
        return first

    async def _tell(
        self, title: str, lists: AsyncIterator[Sequence[ReplicaConfig]], first: asyncio.Event
    ) -> None:
        async for replicas in lists:
            try:
                await self._fleet.sync(title, replicas)
            except ConfigError as error:
                _log.error("%s: the replicas stay as they are: %s", title, error)
            first.set()

    async def _describe(self, source: Source) -> AsyncIterator[list[ReplicaConfig]]:
        """Give what a source finds its template; say what cannot be a replica, once."""
        assert self._discover is not None
        said: set[str] = set()
        async for found in source.watch():
            replicas, complaints = described(found, self._discover.templates)
            for complaint in sorted(set(complaints) - said):
                _log.error("%s: %s", source.title, complaint)
            said = set(complaints)
            yield replicas
