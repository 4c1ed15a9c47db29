"""The process that holds the sockets: it forks the decider and the workers, and forks them anew.

It runs no event loop and no thread, so that it can fork at any time; what it has imported and read
is shared with its children. It serves nobody: whichever child dies, clients find the socket open.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
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
from servegym.serve.router.workers.child import STEADY_S, Child
from servegym.serve.router.workers.decider import Shared
from servegym.serve.router.workers.heartbeats import Heartbeats
from servegym.serve.router.workers.worker import carry
from servegym.serve.until_told import loop_factory, serve_until_told

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_READY = b"\0"
#: A decider that fails so often in a row does not come back.
_MAX_FAILURES = 5
#: For children to end beyond the time that they are given, seconds.
_END_S = 5.0


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
        self._decider_says = (-1, -1)  # pipe, until it decides
        self._said = b""  # through it
        self._has_decided = False
        for end in self._told:
            os.set_blocking(end, False)
        self._decider = Child("the deciding process", self._decide)
        self._workers = [
            Child(f"worker {index}", lambda index=index: self._carry(index))  # type: ignore[misc]
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
            while True:
                self._start_who_is_due()
                self._wait()
                self._hear_decider()
                self._kill_who_hangs()
                self._reap()
        except _Told:
            self._drain()
        finally:
            self._end()
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _decide(self) -> int:
        """Be the decider."""
        self._listener.close()  # workers may stop listening
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

    def _start(self, child: Child) -> None:
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
            for end in (*self._told, self._alive[1], self._decider_says[0]):
                if end >= 0:
                    os.close(end)
            status = child.run()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _startable(self) -> list[Child]:
        """The children that may be there: no worker before something has decided once."""
        return [self._decider, *self._workers] if self._has_decided else [self._decider]

    def _start_who_is_due(self) -> None:
        """Start the children that are not there, those that have failed after their pause.

        Raises:
            ConfigError: If the decider does not come back.
        """
        for child in self._startable():
            if child.pid or child.start_s > time.monotonic():
                continue
            if child is not self._decider:
                self._start(child)
            elif self._decider_says[0] < 0:  # all that the last one has said has been heard
                self._start_decider()

    def _start_decider(self) -> None:
        """Start the decider; while there was one before, requests are refused until it decides.

        Raises:
            ConfigError: If it has failed too often.
        """
        if self._decider.failures > _MAX_FAILURES:
            raise ConfigError(
                f"the deciding process has ended {self._decider.failures} times, each before it "
                f"decided or within {STEADY_S:g} s of its start: the log says why"
            )
        self._said, self._decider_says = b"", os.pipe()
        try:
            self._start(self._decider)
        finally:
            os.close(self._decider_says[1])

    def _hear_decider(self) -> None:
        """Take in what a decider that starts has said: that it decides, or why it cannot.

        Raises:
            ConfigError: If the first one cannot.
        """
        hears = self._decider_says[0]
        if hears < 0 or not select.select([hears], [], [], 0.0)[0]:
            return  # it is up, or has said nothing
        more = os.read(hears, 65536)
        self._said += more
        if self._said.startswith(_READY):
            self._decider.is_up = self._has_decided = True
        elif more:
            return
        else:
            why = self._said.decode() or "the deciding process cannot be started"
            if not self._has_decided:
                raise ConfigError(why)
            _log.error("the deciding process does not come back: %s", why)
        os.close(hears)
        self._decider_says = (-1, -1)

    def _wait(self) -> None:
        """Wait until there is something to do, or to look at.

        Raises:
            _Told: If a signal says to stop.
        """
        due_s = [child.start_s for child in self._startable() if not child.pid]
        left_s = min(due_s, default=math.inf) - time.monotonic()
        says = [end for end in (self._told[0], self._decider_says[0]) if end >= 0]
        select.select(says, [], [], max(0.0, min(left_s, self._look_s)))
        self._hear()

    def _listen(self, timeout_s: float) -> None:
        """Wait for a signal.

        Raises:
            _Told: If it is one to stop.
        """
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
        if signal.SIGHUP in numbers and self._decider.is_up:
            os.kill(self._decider.pid, signal.SIGHUP)

    def _kill_who_hangs(self) -> None:
        """Kill the children whose event loops have stopped: others come, as for any that ends.

        What does not begin its work is given longer: until then nothing may turn its event loop.
        """
        now_s = time.monotonic()
        if now_s - self._looked_s > 2.0 * self._look_s:  # this process has stood still itself
            self._looks_since_s = now_s
        self._looked_s = now_s
        for index, child in enumerate((self._decider, *self._workers)):
            if not child.pid:
                continue
            if self._is_up(index, child):
                silent_s = self._beats.silent_s(index, self._looks_since_s, now_s)
                limit_s, what = self._config.listen.hang_s, "has not moved"
            else:
                silent_s = now_s - max(child.start_s, self._looks_since_s)
                limit_s, what = self._config.listen.start_s, "has not begun its work"
            if silent_s > limit_s:
                said = "%s (%d) %s for %.1f s: it is killed"
                _log.error(said, child.name, child.pid, what, silent_s)
                self._beats.forget(index)
                if child is self._decider and not child.is_up:
                    self._said = (
                        f"the deciding process has not begun to decide within {limit_s:g} s: look "
                        "what it waits for, or give it longer (listen.start_s)"
                    ).encode()
                os.kill(child.pid, signal.SIGKILL)

    def _is_up(self, index: int, child: Child) -> bool:
        """Whether a child has begun its work; the decider says so itself."""
        if child is not self._decider:
            child.is_up |= self._beats.has_begun(index)
        return child.is_up

    def _reap(self, *, stopping: bool = False) -> None:
        """Note which children have ended."""
        for index, child in enumerate((self._decider, *self._workers)):
            if not child.pid:
                continue
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            self._is_up(index, child)
            child.ended()
            self._beats.forget(index)
            if child is not self._decider:
                self._counts[self._workers.index(child)] = NOBODY
            if not stopping and self._has_decided:
                code = os.waitstatus_to_exitcode(status)
                how = f"signal {-code}" if code < 0 else f"status {code}"
                pause_s = child.start_s - time.monotonic()
                _log.error(
                    "%s (%d) has ended with %s: a new one in %.1f s", child.name, pid, how, pause_s
                )

    def _drain(self) -> None:
        """Let the decider end; it waits for requests in progress."""
        self._listener.close()  # workers have it still, until they are told to stop
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
        for end in (*self._told, self._alive[0], self._decider_says[0]):
            if end >= 0:
                os.close(end)

    def _wait_for(self, children: list[Child], timeout_s: float) -> None:
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
