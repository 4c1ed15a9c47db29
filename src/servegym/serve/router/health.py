"""Which replicas take requests: checks, ejection of those that fail requests, and draining."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.router.config import HealthConfig, ReplicaConfig

_log = logging.getLogger(__name__)

#: Seconds between two looks at a replica's list of models.
_MODELS_S = 30.0
_MAX_MODELS_BYTES = 1_000_000


class ReplicaHealth:
    """What is known of one replica's health.

    Attributes:
        up: By its checks.
        draining: By an operator.
        ejected_until_s: By its failed requests; on the dispatcher's clock.
        models: Names it serves; empty while unknown.
        num_ejections: Times it was ejected.
    """

    def __init__(self) -> None:
        self.up = False
        self.draining = False
        self.ejected_until_s = 0.0
        self.models: dict[str, dict[str, object]] = {}
        self.num_ejections = 0
        self.checks_in_row = 0  # equal results
        self.failed_in_row = 0  # requests
        self.eject_s = 0.0  # of the last ejection


class Health:
    """Keeps the dispatcher told which replicas are up.

    Args:
        config: When a replica counts as up.
        replicas: The fleet.
        dispatcher: To tell.
        session: To ask with.

    Attributes:
        replicas: By index.
    """

    def __init__(
        self,
        config: HealthConfig,
        replicas: Sequence[ReplicaConfig],
        dispatcher: Dispatcher,
        session: aiohttp.ClientSession,
    ) -> None:
        self.config = config
        self.replicas = [ReplicaHealth() for _ in replicas]
        self._urls = [replica.url for replica in replicas]
        self._dispatcher = dispatcher
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=config.timeout_s)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Check every replica once, then go on doing so."""
        for r in range(len(self.replicas)):
            self._apply(r)
        await asyncio.gather(*(self._check(r) for r in range(len(self.replicas))))
        self._tasks = [asyncio.create_task(self._run(r)) for r in range(len(self.replicas))]

    async def stop(self) -> None:
        """Stop checking."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def drain(self, replica: int, draining: bool) -> None:
        """Send a replica no more requests, or send it some again."""
        self.replicas[replica].draining = draining
        self._apply(replica)

    def request_failed(self, replica: int, *, refused: bool) -> None:
        """A request has failed at a replica.

        Args:
            replica: Index.
            refused: It did not even take the connection: no need to see that more than once.
        """
        health = self.replicas[replica]
        health.failed_in_row += 1
        if health.failed_in_row < self.config.eject_after and not refused:
            return
        now_s = self._dispatcher.clock()
        if now_s < health.ejected_until_s:
            return
        health.eject_s = min(
            max(self.config.eject_s, 2.0 * health.eject_s), self.config.max_eject_s
        )
        health.ejected_until_s = now_s + health.eject_s
        health.num_ejections += 1
        _log.warning(
            "%s failed %d requests in a row: none for %g s",
            self._dispatcher.names[replica],
            health.failed_in_row,
            health.eject_s,
        )
        self._apply(replica)

    def request_succeeded(self, replica: int) -> None:
        """A replica has begun to answer a request."""
        health = self.replicas[replica]
        health.failed_in_row = 0
        health.eject_s = 0.0

    def models(self) -> dict[str, dict[str, object]]:
        """Models of all replicas that are not down, by name."""
        found: dict[str, dict[str, object]] = {}
        for health in self.replicas:
            if health.up:
                found |= health.models
        return found

    def serves(self, replica: int, model: str) -> bool:
        """Whether a replica has a model, as far as is known."""
        models = self.replicas[replica].models
        return not models or model in models

    async def _run(self, replica: int) -> None:
        interval_s = self.config.interval_s
        # spread over the interval, or all replicas are asked at the same moment
        await asyncio.sleep(interval_s * replica / len(self.replicas))
        next_models_s = 0.0
        while True:
            await self._check(replica)
            now_s = self._dispatcher.clock()
            if self.replicas[replica].up and now_s >= next_models_s:
                next_models_s = now_s + _MODELS_S
                await self._read_models(replica)
            await asyncio.sleep(interval_s)

    async def _check(self, replica: int) -> None:
        health = self.replicas[replica]
        try:
            url = self._urls[replica] + self.config.path
            async with self._session.get(url, timeout=self._timeout) as response:
                good = response.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError):
            good = False
        if good != health.up:
            health.checks_in_row += 1
            needed = self.config.up_after if good else self.config.down_after
            if health.checks_in_row >= needed:
                health.up = good
                health.checks_in_row = 0
                name = self._dispatcher.names[replica]
                _log.warning("%s is %s", name, "up" if good else "down")
                if good:
                    await self._read_models(replica)
                else:
                    self._dispatcher.index.clear(replica)  # it has probably been restarted
        else:
            health.checks_in_row = 0
        self._apply(replica)

    async def _read_models(self, replica: int) -> None:
        """Ask for the list of models; a replica that has none serves whatever it is asked."""
        try:
            url = f"{self._urls[replica]}/v1/models"
            async with self._session.get(url, timeout=self._timeout) as response:
                if response.status != 200 or (response.content_length or 0) > _MAX_MODELS_BYTES:
                    return
                data = (await response.json(content_type=None))["data"]
                self.replicas[replica].models = {str(entry["id"]): dict(entry) for entry in data}
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return

    def _apply(self, replica: int) -> None:
        health = self.replicas[replica]
        ejected = self._dispatcher.clock() < health.ejected_until_s
        up = health.up and not health.draining and not ejected
        self._dispatcher.state.set_up(replica, up)
