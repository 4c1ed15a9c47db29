"""Which replicas take requests: checks, operators' draining, and ejection (`ejection`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import aiohttp
import numpy as np

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.router.config import HealthConfig, ReplicaConfig
from servegym.serve.router.ejection import Ejection
from servegym.typing import BoolArray

_log = logging.getLogger(__name__)

#: Seconds between two looks at a replica's list of models.
_MODELS_S = 30.0
_MAX_MODELS_BYTES = 1_000_000
#: Names of models that are remembered with their replicas.
_MAX_NAMES = 1000


@dataclass
class ReplicaHealth:
    """What is known of one replica's health.

    Attributes:
        up: By its checks.
        draining: By an operator.
        models: Names it serves; empty while unknown.
    """

    up: bool = False
    draining: bool = False
    models: dict[str, dict[str, object]] = field(default_factory=dict)
    checks_in_row: int = 0  # equal results


class Health:
    """Keeps the dispatcher told which replicas are up.

    Args:
        config: When a replica counts as up.
        replicas: The fleet.
        dispatcher: To tell.
        session: To ask with.

    Attributes:
        replicas: By index.
        ejection: Told what becomes of requests.
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
        self._shown_urls = [replica.shown_url for replica in replicas]
        self._dispatcher = dispatcher
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=config.timeout_s)
        self._tasks: list[asyncio.Task[None]] = []
        self._models: dict[str, dict[str, object]] | None = None  # of all, until that changes
        self._serving: dict[str, BoolArray] = {}  # by model
        self.ejection = Ejection(
            config, dispatcher.names, dispatcher.clock, self._peers, self._settle
        )

    async def start(self) -> None:
        """Check every replica once, then go on doing so."""
        self._settle()
        await asyncio.gather(*(self._check(r) for r in range(len(self.replicas))))
        for health, name, url in zip(
            self.replicas, self._dispatcher.names, self._shown_urls, strict=True
        ):
            if not health.up:
                place = url + self.config.path
                _log.error("%s is down: %s has never answered well; is its url right?", name, place)
        self._tasks = [asyncio.create_task(self._run(r)) for r in range(len(self.replicas))]
        self._tasks.append(asyncio.create_task(self._look()))

    async def stop(self) -> None:
        """End the checks of all replicas."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
            for health in self.replicas:
                if health.up:
                    self._models |= health.models
        return self._models

    def serving(self, model: str) -> BoolArray:
        """Replicas that have a model, as far as is known, `bool[R]`; not to be changed."""
        found = self._serving.get(model)
        if found is None:
            found = np.array([self.serves(r, model) for r in range(len(self.replicas))])
            if len(self._serving) >= _MAX_NAMES:  # clients name what they like
                self._serving.clear()
            self._serving[model] = found
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
        if not up:
            self._dispatcher.index.clear(replica)  # it has probably been restarted

    async def _look(self) -> None:
        config = self.config
        pause_s = min(1.0, config.silent_after_s / 4, config.eject_s / 4)
        while True:
            await asyncio.sleep(pause_s)
            self.ejection.look()

    async def _read_models(self, replica: int) -> None:
        """Ask for the list of models; a replica that has none serves whatever it is asked."""
        try:
            url = f"{self._urls[replica]}/v1/models"
            async with self._session.get(url, timeout=self._timeout) as response:
                if response.status != 200 or (response.content_length or 0) > _MAX_MODELS_BYTES:
                    return
                data = (await response.json(content_type=None))["data"]
                self.replicas[replica].models = {str(entry["id"]): dict(entry) for entry in data}
                self._serving.clear()
                self._models = None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError, TypeError):
            return

    def _peers(self, replica: int) -> list[int]:
        """Replicas that are up and have a model in common with one, itself included."""
        mine = self.replicas[replica].models.keys()
        return [
            r
            for r, health in enumerate(self.replicas)
            if health.up
            and not health.draining
            and (not mine or not health.models or mine & health.models.keys())
        ]

    def _settle(self) -> None:
        """Tell the dispatcher who takes requests; of the ejected ones only so many are kept out.

        A replica that is the last to serve a model is never kept out.
        """
        up = {r for r, health in enumerate(self.replicas) if health.up and not health.draining}
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
        for r in range(len(self.replicas)):
            self._dispatcher.state.set_up(r, r in up and r not in kept_out)
