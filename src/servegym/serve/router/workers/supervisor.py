"""The process that holds the sockets: it forks the decider and the workers, and forks them anew.

It runs no event loop and no thread, so that it can fork at any time; what it has imported and read
is shared with its children. It serves nobody: whichever child dies, clients find the socket open.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from servegym.errors import ConfigError, ServeGymError
from servegym.serve.listening import BACKLOG, bind
from servegym.serve.router.app import Router
from servegym.serve.router.config import RouterConfig
from servegym.serve.router.workers.acceptor import NOBODY, shared_counts
from servegym.serve.router.workers.decider import Shared
from servegym.serve.router.workers.heartbeats import Heartbeats
from servegym.serve.router.workers.worker import carry
from servegym.serve.until_told import loop_factory, serve_until_told

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_READY = b"\0"
#: A child that lives shorter than this, seconds, has failed to start: it is started again later and
#: later.
_STEADY_S = 10.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
#: A decider that fails so often in a row does not come back.
_MAX_FAILURES = 5
#: For children to end beyond the time that they are given, seconds.
_END_S = 5.0


class _Child:
    """The decider or a worker.

    Attributes:
        name: In the log.
        run: What it does, and its exit status.
        pid: Of its process, 0 while there is none.
        start_s: When it is, or was, to be started.
        failures: How often in a row it has ended soon after.
    """

    def __init__(self, name: str, run: Callable[[], int]) -> None:
        self.name = name
        self.run = run
        self.pid = 0
        self.start_s = 0.0
        self.failures = 0

    def ended(self) -> None:
        """Its process has ended: when to start it again?"""
        now_s = time.monotonic()
        self.pid = 0
        self.failures = self.failures + 1 if now_s - self.start_s < _STEADY_S else 1
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self.failures - 1), _LONGEST_PAUSE_S)
        self.start_s = now_s + pause_s


class _Told(Exception):
    """Raised when it is told to stop."""


class Supervisor:
    """Keeps a decider and workers running.

    Args:
        config: Of the router.
        ready: Called, in the decider's process, when it decides.
        listener: For clients; listening.
        admin: For operators; bound.
        folder: For the decider's socket; no other user can open it.
    """

    def __init__(
        self,
        config: RouterConfig,
        ready: Callable[[Router], None],
        listener: socket.socket,
        admin: socket.socket,
        folder: Path,
    ) -> None:
        self._config = config
        self._ready = ready
        self._listener = listener
        self._shared = Shared(folder / "decider", int(listener.getsockname()[1]), admin)
        self._counts = shared_counts(config.listen.workers)
        self._beats = Heartbeats(1 + config.listen.workers)  # the decider's is the first
        self._look_s = config.listen.hang_s / 4.0
        self._looked_s = self._looks_since_s = time.monotonic()
        self._told = os.pipe()  # numbers of signals
        self._alive = os.pipe()  # nothing; children see its end
        self._decider_says = (-1, -1)
        for end in self._told:
            os.set_blocking(end, False)
        self._decider = _Child("the deciding process", self._decide)
        self._workers = [
            _Child(f"worker {index}", lambda index=index: self._carry(index))  # type: ignore[misc]
            for index in range(config.listen.workers)
        ]

    def run(self) -> None:
        """Serve until a signal says to stop, then let requests end.

        Raises:
            ServeGymError: If there can be no decider.
        """
        before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        signal.set_wakeup_fd(self._told[1])
        gc.freeze()
        try:
            self._start_decider()
            while True:
                now_s = time.monotonic()
                for child in self._workers:
                    if not child.pid and child.start_s <= now_s:
                        self._start(child)
                waiting = [child.start_s for child in self._workers if not child.pid]
                self._listen(min([*(start_s - now_s for start_s in waiting), self._look_s]))
                self._kill_who_hangs()
                self._reap()
                if not self._decider.pid:
                    self._start_decider_again()
        except _Told:
            self._drain()
        finally:
            self._end()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _decide(self) -> int:
        """Be the decider."""
        says = self._decider_says[1]

        def ready(router: Router) -> None:
            self._ready(router)
            os.write(says, _READY)

        async def run() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()

            def is_alone() -> None:
                loop.remove_reader(self._alive[0])  # its end stays readable
                stop.set()

            loop.add_reader(self._alive[0], is_alone)
            self._beats.beat(0)
            await serve_until_told(Router(self._config, self._shared), ready, stop)

        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(run())
        except ServeGymError as error:
            os.write(says, str(error).encode())
            return 2
        return 0

    def _carry(self, index: int) -> int:
        """Be a worker; it ends when the supervisor lets it, whoever gets a signal."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

        async def run() -> int:
            self._beats.beat(1 + index)
            return await carry(
                self._config, self._shared.path, self._listener, self._counts, index, self._alive[0]
            )

        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(run())

    def _start(self, child: _Child) -> None:
        sys.stdout.flush()
        child.start_s = time.monotonic()
        child.pid = os.fork()
        if child.pid:
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            for end in (*self._told, self._alive[1]):
                os.close(end)
            status = child.run()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _start_decider(self) -> None:
        """Start the decider and wait until it decides.

        Raises:
            ConfigError: If it does not come to that.
        """
        self._decider_says = os.pipe()
        hears, says = self._decider_says
        try:
            self._start(self._decider)
        finally:
            os.close(says)
        said = b""
        try:
            while not said.startswith(_READY):
                select.select([hears, self._told[0]], [], [])
                self._hear()
                if hears in select.select([hears], [], [], 0.0)[0]:
                    more = os.read(hears, 65536)
                    if not more:
                        raise ConfigError(said.decode() or "the deciding process cannot be started")
                    said += more
        finally:
            os.close(hears)

    def _start_decider_again(self) -> None:
        """Start a decider that has ended; requests are refused meanwhile.

        Raises:
            ConfigError: If it does not come back.
        """
        while not self._decider.pid:
            if self._decider.failures > _MAX_FAILURES:
                raise ConfigError(
                    f"the deciding process has ended {self._decider.failures} times, each within "
                    f"{_STEADY_S:g} s of its start: the log says why"
                )
            self._listen(self._decider.start_s - time.monotonic())
            if time.monotonic() < self._decider.start_s:
                continue
            try:
                self._start_decider()
            except ConfigError as error:
                _log.error("the deciding process does not come back: %s", error)
                os.waitpid(self._decider.pid, 0)
                self._decider.ended()

    def _listen(self, timeout_s: float | None) -> None:
        """Wait for a signal.

        Raises:
            _Told: If it is one to stop.
        """
        timeout_s = None if timeout_s is None else max(0.0, timeout_s)
        select.select([self._told[0]], [], [], timeout_s)
        self._hear()

    def _hear(self) -> None:
        """Do what signals say that have come.

        Raises:
            _Told: If it is to stop.
        """
        try:
            numbers = os.read(self._told[0], 4096)
        except BlockingIOError:
            return
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            raise _Told
        if signal.SIGHUP in numbers and self._decider.pid:
            os.kill(self._decider.pid, signal.SIGHUP)

    def _kill_who_hangs(self) -> None:
        """Kill the children whose event loops have stopped: others come, as for any that ends."""
        now_s = time.monotonic()
        if now_s - self._looked_s > 2.0 * self._look_s:  # this process has stood still itself
            self._looks_since_s = now_s
        self._looked_s = now_s
        for index, child in enumerate((self._decider, *self._workers)):
            silent_s = self._beats.silent_s(index, self._looks_since_s, now_s)
            if child.pid and silent_s > self._config.listen.hang_s:
                what = "%s (%d) has not moved for %.1f s: it is killed"
                _log.error(what, child.name, child.pid, silent_s)
                self._beats.forget(index)
                os.kill(child.pid, signal.SIGKILL)

    def _reap(self, *, stopping: bool = False) -> None:
        """Note which children have ended."""
        for index, child in enumerate((self._decider, *self._workers)):
            if not child.pid:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            child.ended()
            self._beats.forget(index)
            if child is not self._decider:
                self._counts[self._workers.index(child)] = NOBODY
            if not stopping:
                code = os.waitstatus_to_exitcode(status)
                how = f"signal {-code}" if code < 0 else f"status {code}"
                pause_s = child.start_s - time.monotonic()
                _log.error(
                    "%s (%d) has ended with %s: a new one in %.1f s", child.name, pid, how, pause_s
                )

    def _drain(self) -> None:
        """Let the decider end; it waits for requests in progress."""
        if self._decider.pid:
            os.kill(self._decider.pid, signal.SIGTERM)
        self._wait_for([self._decider], self._config.drain_s + _END_S)

    def _end(self) -> None:
        """Let the workers end, and kill what does not."""
        os.close(self._alive[1])
        self._wait_for([self._decider, *self._workers], _END_S)
        for child in (self._decider, *self._workers):
            if child.pid:
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
        for end in (*self._told, self._alive[0]):
            os.close(end)

    def _wait_for(self, children: list[_Child], timeout_s: float) -> None:
        until_s = time.monotonic() + timeout_s
        while (left_s := until_s - time.monotonic()) > 0.0:
            self._reap(stopping=True)
            if not any(child.pid for child in children):
                return
            try:
                self._listen(min(left_s, 0.1))
            except _Told:
                continue  # it is stopping


def supervise(config: RouterConfig, ready: Callable[[Router], None]) -> None:
    """Run a router of several processes until it is told to stop; see `serve.router.app.serve`.

    Args:
        config: Its configuration.
        ready: Called, in the process that decides, whenever that has been started.

    Raises:
        ServeGymError: If the configuration cannot be used, or nothing can decide any more.
    """
    listen = config.listen
    try:
        with (
            bind(listen.host, listen.port) as listener,
            bind(listen.admin_host, listen.admin_port) as admin,
            tempfile.TemporaryDirectory(prefix="servegym-") as folder,
        ):
            listener.setblocking(False)
            listener.listen(BACKLOG)
            Supervisor(config, ready, listener, admin, Path(folder)).run()
    except OSError as error:
        raise ConfigError(f"the router cannot listen: {error.strerror or error}") from error
