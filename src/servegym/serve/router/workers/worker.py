"""A process that carries bytes between clients and replicas, and decides nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from servegym.serve.monitoring.loop_lag import LoopLag
from servegym.serve.requests.prompt import PromptReader
from servegym.serve.router.api import Api
from servegym.serve.router.auth import Keys, upstream_key
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.proxy import Proxy
from servegym.serve.router.server import Server
from servegym.serve.router.workers.acceptor import Acceptor
from servegym.serve.router.workers.remote import RemoteDesk

_log = logging.getLogger(__name__)

#: For a decider that has gone to come back, seconds; until then clients get 503.
BACK_S = 60.0
#: For the supervisor to let go of a worker whose decider has ended as it was told to, seconds.
_ORDERLY_S = 0.2


class Worker:
    """Takes requests, asks the decider about each, and carries the answer.

    Args:
        config: Of the router.
        path: Of the decider's socket.

    Attributes:
        server: Takes clients' connections.
    """

    def __init__(self, config: RouterConfig, path: Path) -> None:
        self._unready_s = config.unready_s
        self._has_keys, self._leaving = asyncio.Event(), asyncio.Event()
        self._desk = RemoteDesk(config, path, self._keys_changed, self._leaving.set)
        self._proxy = Proxy(
            config.request,
            time.monotonic,
            upstream_key(config.upstream_key_env),
            config.disaggregation,
        )
        reader = PromptReader(config.dispatch.prefix)
        self._api = Api(config, self._desk, reader, self._proxy, None, time.monotonic)
        self._loop_lag = LoopLag(self._desk.lags)
        self.server: Server = self._api.server()

    async def connect(self, timeout_s: float = BACK_S) -> bool:
        """Find the decider and learn the API keys; return whether it was there in time."""
        until_s = time.monotonic() + timeout_s
        self._has_keys.clear()
        while await self._desk.connect(until_s - time.monotonic()):
            said = {
                asyncio.create_task(self._has_keys.wait()),
                asyncio.create_task(self._desk.lost()),
            }
            await asyncio.wait(said, return_when=asyncio.FIRST_COMPLETED)
            for one in said:
                one.cancel()
            if self._has_keys.is_set():
                self._loop_lag.start()
                return True
        return False

    async def stay_connected(self) -> None:
        """Return when the decider has gone and does not come back."""
        while True:
            await self._desk.lost()
            self._loop_lag.stop()
            await asyncio.sleep(_ORDERLY_S)
            _log.warning("the deciding process has gone: new requests are refused")
            if not await self.connect():
                return

    async def leave_when_told(self, stop_listening: Callable[[], None]) -> None:
        """Once the router stops, let clients go elsewhere; see `Server.leave`."""
        await self._leaving.wait()
        await self.server.leave(self._unready_s, stop_listening)
        self._desk.left()

    async def stop(self) -> None:
        """Cut off what there is."""
        self._loop_lag.stop()
        await self.server.stop()
        self._proxy.close()
        await self._api.close()
        self._desk.close()

    def _keys_changed(self, keys: Keys | None) -> None:
        self._api.keys = keys
        self._has_keys.set()


async def carry(
    config: RouterConfig,
    path: Path,
    listener: socket.socket,
    counts: memoryview[int],
    index: int,
    lifeline: int,
) -> int:
    """Be a worker until the process that started it lets go of the lifeline.

    Args:
        config: Of the router.
        path: Of the decider's socket.
        listener: For clients.
        counts: Of connections, by worker.
        index: Of this worker.
        lifeline: Reading end of a pipe that is never written to.

    Returns:
        Exit status: 1 if the decider has gone and has not come back.
    """
    loop = asyncio.get_running_loop()
    let_go = asyncio.Event()
    loop.add_reader(lifeline, let_go.set)
    worker = Worker(config, path)
    if not await worker.connect():
        _log.error("worker %d has found no deciding process", index)
        return 1
    gc.freeze()
    worker.server.sweep()
    acceptor = Acceptor(listener, counts, index, worker.server)
    ends = [
        asyncio.create_task(let_go.wait()),
        asyncio.create_task(worker.stay_connected()),
    ]
    leaving = asyncio.create_task(worker.leave_when_told(acceptor.stop))
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    loop.remove_reader(lifeline)
    acceptor.stop()
    await worker.stop()
    for task in (*ends, leaving):
        task.cancel()
    return 0 if let_go.is_set() else 1
