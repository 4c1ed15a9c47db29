"""Polling engines' metrics into the live state."""

from __future__ import annotations

import asyncio
import logging
import time

import aiohttp

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.monitoring.metrics import MetricNames, MetricsError, read_metrics
from servegym.serve.state import EngineMetrics

_log = logging.getLogger(__name__)

#: A page beyond this is no metrics page; vLLM's has 50 kB.
_MAX_PAGE_BYTES = 4_000_000
#: The format that `serve.monitoring.metrics` reads; in OpenMetrics times would be in another unit.
_HEADERS = {"Accept": "text/plain; version=0.0.4"}


class MetricsPoller:
    """Asks every replica for its metrics, each at its own pace; failures only make them older.

    Args:
        names: Of the metrics; `None`: those of a known engine.
        dispatcher: To tell.
        session: To ask with.
        interval_s: Time between two polls of a replica.
        timeout_s: Of one poll.

    Attributes:
        num_failed: Failed polls, by slot.
    """

    def __init__(
        self,
        names: MetricNames | None,
        dispatcher: Dispatcher,
        session: aiohttp.ClientSession,
        *,
        interval_s: float,
        timeout_s: float,
    ) -> None:
        self.num_failed: dict[int, int] = {}
        self._names = names
        self._dispatcher = dispatcher
        self._session = session
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._urls: dict[int, str] = {}
        self._complaint: dict[int, str] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._running = False

    def add(self, replica: int, url: str) -> None:
        """A replica has joined.

        Args:
            replica: Its slot.
            url: Of its metrics page.
        """
        self._urls[replica] = url
        self.num_failed[replica], self._complaint[replica] = 0, ""
        if self._running:
            self._tasks[replica] = asyncio.create_task(self._run(replica))

    def remove(self, replica: int) -> None:
        """A replica has gone."""
        if task := self._tasks.pop(replica, None):
            task.cancel()
        for known in (self._urls, self.num_failed, self._complaint):
            del known[replica]

    async def start(self) -> None:
        """Poll every replica once, then go on doing so."""
        await asyncio.gather(*(self._poll(r) for r in self._urls))
        self._running = True
        for k, r in enumerate(self._urls):
            # spread over the interval, or all replicas are asked at the same moment
            wait_s = self._interval_s * (1.0 + k / len(self._urls))
            self._tasks[r] = asyncio.create_task(self._run(r, wait_s))

    async def stop(self) -> None:
        """End the polling of all replicas."""
        self._running = False
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    async def _run(self, replica: int, wait_s: float = 0.0) -> None:
        await asyncio.sleep(wait_s)
        while True:
            await self._poll(replica)
            await asyncio.sleep(self._interval_s)

    async def _poll(self, replica: int) -> None:
        # the age counts from the question, not the answer: a slow page is not fresher
        asked_s, url = self._dispatcher.clock(), self._urls[replica]
        said: EngineMetrics | str
        try:
            said = await fetch_metrics(self._session, url, self._names, self._timeout_s)
        except MetricsError as error:
            said = str(error)
        if self._urls.get(replica) != url:
            return  # it has gone meanwhile
        if isinstance(said, EngineMetrics):
            self._dispatcher.update_metrics(replica, said, asked_s)
            said = ""
        else:
            self.num_failed[replica] += 1
            if said != self._complaint[replica]:
                _log.warning("%s: %s", self._dispatcher.names[replica], said)
        self._complaint[replica] = said


async def fetch_metrics(
    session: aiohttp.ClientSession, url: str, names: MetricNames | None, timeout_s: float
) -> EngineMetrics:
    """Ask for a metrics page and read it.

    Args:
        session: To ask with.
        url: Of the page.
        names: What to look for; `None` tries the known engines.
        timeout_s: For all of it.

    Raises:
        MetricsError: If there is no page, or a quantity is not on it.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    try:
        async with session.get(url, timeout=timeout, headers=_HEADERS) as response:
            if response.status != 200:
                raise MetricsError(f"the metrics page answers {response.status}")
            page = await response.content.read(_MAX_PAGE_BYTES)
            while not response.content.at_eof() and len(page) < _MAX_PAGE_BYTES:
                page += await response.content.read(_MAX_PAGE_BYTES - len(page))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise MetricsError(f"the metrics page cannot be read: {type(error).__name__}") from error
    return read_metrics(page.decode("utf-8", "replace"), names, time.time())
