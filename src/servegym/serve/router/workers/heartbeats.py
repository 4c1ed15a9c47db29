"""When each process has last moved: one that hangs is told from one that has nothing to do."""

from __future__ import annotations

import asyncio
import mmap
import time

#: Between two beats, seconds.
_BEAT_S = 0.25


class Heartbeats:
    """Times in memory that forked processes share, on the clock that they share, too.

    Args:
        num_processes: How many there are.
    """

    def __init__(self, num_processes: int) -> None:
        self._beats = memoryview(mmap.mmap(-1, 8 * num_processes)).cast("d")

    def beat(self, index: int) -> None:
        """Begin, on the running loop, to say that it turns."""
        loop = asyncio.get_running_loop()
        self._beats[index] = time.monotonic()
        loop.call_later(_BEAT_S, self.beat, index)

    def forget(self, index: int) -> None:
        """A process has ended; the next one in its place has yet to begin."""
        self._beats[index] = 0.0

    def has_begun(self, index: int) -> bool:
        """Whether the event loop of a process has turned."""
        return self._beats[index] > 0.0

    def silent_s(self, index: int, since_s: float, now_s: float) -> float:
        """Return for how long a process has not moved; 0 before its first beat.

        Args:
            index: Of the process.
            since_s: When whoever asks began to look without a break: before that it may have stood
                still itself, and the others with it.
            now_s: The time.
        """
        beat_s = self._beats[index]
        return now_s - max(beat_s, since_s) if beat_s else 0.0
