"""Saying that kernels are being compiled: a first use does nothing else for minutes."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

from numba.core.event import Event, Listener, register

#: What is said goes through this logger, which Python prints on standard error by default.
_log = logging.getLogger("servegym.compile")

#: Set to 0 to have nothing said.
SWITCH = "SERVEGYM_COMPILE_NOTICE"
#: Compiling that is over sooner is not worth a line.
PATIENCE_S = 1.0
#: No kernel began for this long: what was asked for is compiled.
QUIET_S = 1.0


class CompileNotice(Listener):
    """Listens to Numba: a line when compiling begins to take time, and one when it is over.

    Kernels that are loaded from disk make no event, so nothing is said of them, and nothing is
    added to any call of a kernel.

    Args:
        counts: Tells a kernel of servegym from other functions that Numba compiles.
        say: Takes each line.
        patience_s: Compiling for this long is announced.
        quiet_s: After this long without compiling the end is announced.
    """

    def __init__(
        self,
        counts: Callable[[object], bool],
        say: Callable[[str], None] = _log.warning,
        *,
        patience_s: float = PATIENCE_S,
        quiet_s: float = QUIET_S,
    ) -> None:
        self._counts, self._say = counts, say
        self._patience_s, self._quiet_s = patience_s, quiet_s
        self._trouble: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Begin anew, as in a child process, which has none of its parent's threads."""
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._depth = self._kernels = 0
        self._begin_s = self._spent_s = 0.0
        self._announced = False

    def on_start(self, event: Event) -> None:
        """A kernel, or one that it calls, begins to be compiled."""
        if not self._counts(event.data["dispatcher"]):
            return
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._begin_s = time.monotonic()
                self._set_timer(max(0.0, self._patience_s - self._spent_s), self._announce)

    def on_end(self, event: Event) -> None:
        """It is compiled, or cannot be."""
        if not self._counts(event.data["dispatcher"]):
            return
        with self._lock:
            self._depth -= 1
            self._kernels += 1
            if self._depth == 0:
                self._spent_s += time.monotonic() - self._begin_s
                self._set_timer(self._quiet_s, self.finish)

    def finish(self) -> None:
        """Say that compiling is over, if it was said that it began."""
        with self._lock:
            if self._depth:
                return
            announced, kernels, spent_s = self._announced, self._kernels, self._spent_s
            self._announced, self._kernels, self._spent_s = False, 0, 0.0
        if announced:
            self._say(f"servegym: compiled {kernels} kernels in {spent_s:.0f} s")

    def not_kept(self, why: str) -> None:
        """Say, once for each reason, that the next start will have to compile again."""
        with self._lock:
            if why in self._trouble:
                return
            self._trouble.add(why)
        self._say(
            f"servegym: compiled kernels cannot be kept ({why}): every start will compile them"
            " again, unless NUMBA_CACHE_DIR names a folder that can be written, or `servegym"
            " compile` has filled the cache before the file system became read-only"
        )

    def _announce(self) -> None:
        with self._lock:
            if self._announced or not self._depth:
                return
            self._announced = True
        self._say(
            "servegym: compiling kernels, which a first use needs: about 1 to 2 minutes on an idle"
            " processor"
        )

    def _set_timer(self, delay_s: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(delay_s, then)
        self._timer.daemon = True
        # without a thread, as at the end of the process, nothing is said
        with contextlib.suppress(RuntimeError):
            self._timer.start()


class CompileCounter(Listener):
    """Counts what Numba compiles, the functions that kernels call included.

    Attributes:
        kernels: How many functions were compiled.
    """

    kernels = 0

    def on_start(self, event: Event) -> None:
        """Do nothing: what is being compiled may fail."""

    def on_end(self, event: Event) -> None:
        """Count."""
        self.kernels += 1


def install(counts: Callable[[object], bool]) -> CompileNotice:
    """Listen from now on, in this process and its children; obeys `SERVEGYM_COMPILE_NOTICE`."""
    said = os.environ.get(SWITCH, "1") != "0"
    notice = CompileNotice(counts, _log.warning if said else _log.debug)
    register("numba:compile", notice)
    atexit.register(notice.finish)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=notice.forget)
    return notice
