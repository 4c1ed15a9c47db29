"""Which replicas take requests: checks, operators' draining, and ejection (`ejection`)."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.router.config import HealthConfig
from servegym.serve.router.ejection import Ejection
from servegym.serve.router.replica import shown
from servegym.serve.router.slow_start import SlowStart
from servegym.typing import BoolArray

_log = logging.getLogger(__name__)

_MAX_MODELS_BYTES = 1_000_000
#: Names of models that are remembered with their replicas.
_MAX_NAMES = 1000


@dataclass
class ReplicaHealth:
    """What is known of one replica's health.

    Attributes:
        url: Of its server.
        up: By its checks.
        draining: By an operator.
        leaving: It is no longer of the fleet, but for its last requests.
        models: Names it serves; empty while unknown.
    """

    url: str
    up: bool = False
    draining: bool = False
    leaving: bool = False
    models: dict[str, dict[str, object]] = field(default_factory=dict)
    checks_in_row: int = 0  # equal results

    @property
    def takes_requests(self) -> bool:
        """Whether it would take requests, if requests had shown nothing against it."""
        return self.up and not self.draining and not self.leaving


class Health:
    """Keeps the dispatcher told which replicas are up.

    Args:
        config: When a replica counts as up.
        dispatcher: To tell.
        session: To ask with.

    Attributes:
        replicas: By slot.
        ejection: Told what becomes of requests.
        slow_start: Knows who has come up lately.
    """

    def __init__(
        self,
        config: HealthConfig,
        dispatcher: Dispatcher,
        session: aiohttp.ClientSession,
    ) -> None:
        self.config = config
        self.replicas: dict[int, ReplicaHealth] = {}
        self._dispatcher = dispatcher
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=config.timeout_s)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._looking: asyncio.Task[None] | None = None
        self._models: dict[str, dict[str, object]] | None = None  # of all, until that changes
        self._serving: dict[str, BoolArray] = {}  # by model
        self.slow_start = SlowStart(config.slow_start_s, dispatcher.state, dispatcher.clock)
        self.ejection = Ejection(
            config, dispatcher.names, dispatcher.clock, self._peers, self._settle
        )

    def add(self, replica: int, url: str) -> None:
        """A replica has joined: down, until a check is good.

        Args:
            replica: Its slot.
            url: Of its server.
        """
        self.replicas[replica] = ReplicaHealth(url)
        self.ejection.add(replica)
        self._serving.clear()
        self._settle()
        if self._looking is not None:
            self._tasks[replica] = asyncio.create_task(self._run(replica))

    def leave(self, replica: int) -> None:
        """A replica leaves: it gets no more requests."""
        self.replicas[replica].leaving = True
        self._models = None
        self._settle()

    def remove(self, replica: int) -> None:
        """A replica has gone, after its last request."""
        if task := self._tasks.pop(replica, None):
            task.cancel()
        del self.replicas[replica]
        self.ejection.remove(replica)
        self.slow_start.forget(replica)
        self._serving.clear()
        self._models = None

    async def start(self) -> None:
        """Check every replica once, then go on doing so."""
        await asyncio.gather(*(self._check(r) for r in self.replicas))
        for r, health in self.replicas.items():
            if not health.up:
                name, place = self._dispatcher.names[r], shown(health.url) + self.config.path
                _log.error("%s is down: %s has never answered well; is its url right?", name, place)
        self._looking = asyncio.create_task(self._look())
        for k, r in enumerate(self.replicas):
            # spread over the interval, or all replicas are asked at the same moment
            wait_s = self.config.interval_s * (1.0 + k / len(self.replicas))
            self._tasks[r] = asyncio.create_task(self._run(r, wait_s))

    async def stop(self) -> None:
        """End the checks of all replicas."""
        tasks = list(self._tasks.values())
        if self._looking is not None:
            tasks.append(self._looking)
            self._looking = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    def counts(self) -> tuple[int, int]:
        """Return how many replicas take requests, and how many there are."""
        num = sum(not health.leaving for health in self.replicas.values())
        return int(self._dispatcher.state.up.sum()), num

    def is_idle(self, replica: int) -> bool:
        """Whether no request is at a replica, nor on its way there."""
        return self.ejection.standings[replica].idle

    def drain(self, replica: int, draining: bool) -> None:
        """Send a replica no more requests, or send it some again."""
        self.replicas[replica].draining = draining
        self._settle()

    def refused(self, replica: int) -> None:
        """A replica did not take a connection: it is down until a check says otherwise."""
        health = self.replicas[replica]
        if health.up:
            self._set_up(replica, False)
            health.checks_in_row = 0
            self._settle()

    def models(self) -> dict[str, dict[str, object]]:
        """Models of all replicas that are not down, by name; not to be changed."""
        if self._models is None:
            self._models = {}
            for _, health in sorted(self.replicas.items()):
                if health.up and not health.leaving:
                    self._models |= health.models
        return self._models

    def serving(self, model: str) -> BoolArray:
        """Replicas that have a model, as far as is known, `bool[W]`; not to be changed."""
        found = self._serving.get(model)
        if found is None:
            found = np.zeros(self._dispatcher.state.num_slots, np.bool_)
            found[[r for r in self.replicas if self.serves(r, model)]] = True
            if len(self._serving) >= _MAX_NAMES:  # clients name what they like
                self._serving.clear()
            self._serving[model] = found
        return found

    def serves(self, replica: int, model: str) -> bool:
        """Whether a replica has a model, as far as is known; any has the one that nobody names."""
        models = self.replicas[replica].models
        return not model or not models or model in models

    async def _run(self, replica: int, wait_s: float = 0.0) -> None:
        await asyncio.sleep(wait_s)
        next_models_s = 0.0
        while True:
            await self._check(replica)
            now_s = self._dispatcher.clock()
            if self.replicas[replica].up and now_s >= next_models_s:
                next_models_s = now_s + self.config.models_interval_s
                await self._read_models(replica)
            await asyncio.sleep(self.config.interval_s)

    async def _check(self, replica: int) -> None:
        health = self.replicas[replica]
        try:
            url = health.url + self.config.path
            async with self._session.get(url, timeout=self._timeout) as response:
                good = response.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError):
            good = False
        if self.replicas.get(replica) is not health:
            return  # it has gone meanwhile
        if good != health.up:
            health.checks_in_row += 1
            needed = self.config.up_after if good else self.config.down_after
            if health.checks_in_row >= needed:
                health.checks_in_row = 0
                self._set_up(replica, good)
                if good:
                    await self._read_models(replica)
        else:
            health.checks_in_row = 0
        self._settle()

    def _set_up(self, replica: int, up: bool) -> None:
        self.replicas[replica].up = up
        self._models = None
        _log.warning("%s is %s", self._dispatcher.names[replica], "up" if up else "down")
        if up and self._looking is not None:  # else the whole fleet is new
            self.slow_start.begin(replica)
        if not up:
            self.slow_start.forget(replica)
            self._dispatcher.index.clear(replica)  # it has probably been restarted

    async def _look(self) -> None:
        config = self.config
        pause_s = min(1.0, config.silent_after_s / 4, config.eject_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            self.ejection.look()

    async def _read_models(self, replica: int) -> None:
        """Ask for the list of models; a replica that has none serves whatever it is asked."""
        health = self.replicas[replica]
        try:
            url = f"{health.url}/v1/models"
            async with self._session.get(url, timeout=self._timeout) as response:
                if response.status != 200 or (response.content_length or 0) > _MAX_MODELS_BYTES:
                    return
                data = (await response.json(content_type=None))["data"]
                health.models = {str(entry["id"]): dict(entry) for entry in data}
                self._serving.clear()
                self._models = None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return

    def _peers(self, replica: int) -> list[int]:
        """Replicas that are up and have a model in common with one, itself included."""
        mine = self.replicas[replica].models.keys()
        return [
            r
            for r, health in self.replicas.items()
            if health.takes_requests
            and (not mine or not health.models or mine & health.models.keys())
        ]

    def _settle(self) -> None:
        """Tell the dispatcher who takes requests; of the ejected ones only so many are kept out.

        A replica that is the last to serve a model is never kept out.
        """
        up = {r for r, health in self.replicas.items() if health.takes_requests}
        kept_out: set[int] = set()
        for r in self.ejection.out(self._dispatcher.clock()):
            if r not in up:
                continue
            peers = set(self._peers(r))
            left = peers - kept_out - {r}
            models = self.replicas[r].models
            served = all(any(self.serves(p, model) for p in left) for model in models)
            if left and served and self.ejection.may_be_out(len(peers & kept_out), len(peers)):
                kept_out.add(r)
        for r in self.replicas:
            self._dispatcher.state.set_up(r, r in up and r not in kept_out)
