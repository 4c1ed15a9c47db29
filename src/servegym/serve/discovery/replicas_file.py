"""A file with a list of replicas, read anew whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from servegym.errors import ConfigError
from servegym.serve.facts import replica_facts
from servegym.serve.router.auth import watch_file
from servegym.serve.router.replica import ReplicaConfig, read_replicas

_log = logging.getLogger(__name__)


class ReplicasFile:
    """Reads a file of replicas.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = f"replicas_file {path}"
        self._changed = asyncio.Event()

    def read(self) -> tuple[ReplicaConfig, ...]:
        """Return what it holds.

        Raises:
            ConfigError: If it is wrong, or the hardware of a replica is not known.
        """
        replicas = read_replicas(self.path)
        for replica in replicas:
            try:
                replica_facts(replica.facts)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {replica.name}: {error}") from error
        return replicas

    def read_anew(self) -> None:
        """Read it anew now, changed or not."""
        self._changed.set()

    async def watch(self) -> AsyncIterator[tuple[ReplicaConfig, ...]]:
        """Yield what the file holds; while it is wrong nothing changes, which is said."""
        loop = asyncio.get_running_loop()

        def changed() -> None:
            loop.call_soon_threadsafe(self._changed.set)

        looking = loop.create_task(watch_file(self.path, changed))
        try:
            while True:
                self._changed.clear()
                try:
                    replicas = await asyncio.to_thread(self.read)
                except ConfigError as error:
                    _log.error("the replicas stay as they are: %s", error)
                else:
                    _log.info("%s names %d replicas", self.path, len(replicas))
                    yield replicas
                await self._changed.wait()
        finally:
            looking.cancel()
