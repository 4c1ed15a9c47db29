"""Which answered request an arriving one follows: known by its session, or by its prompt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from servegym.serve.requests.prompt import Prompt
from servegym.workloads.followed import By, Followed

#: A turn that adds more blocks than this to the one before is not recognised by its prompt: so
#: many look-ups are made at most.
MAX_NEW_BLOCKS = 1024
#: Requests with the same whole blocks that are told apart by what comes after, the latest.
_MAX_ALIKE = 8
#: Longer names of sessions are kept as digests.
_MAX_NAME = 128


class Mark(NamedTuple):
    """What those that follow a request will know it by.

    Attributes:
        by: How.
        tenant: Whose it is.
        place: Name of its session, or of its last whole block.
        tail_bytes: Length of its prompt beyond that block.
        tail_hash: Of that rest.
    """

    by: By
    tenant: str
    place: Hashable
    tail_bytes: int = 0
    tail_hash: int = 0


class _End(NamedTuple):
    key: str
    time_s: float
    mark: Mark


class RecentEnds:
    """Answered requests, those whose last like them was answered longest ago forgotten first.

    A request of a named session follows the one of that session which was answered last. Another
    one follows the longest earlier prompt of its tenant, of at least a block, that its own begins
    with; of equal ones the latest. Those still in progress are followed by none.

    Args:
        max_ends: Remembers so many.
    """

    def __init__(self, max_ends: int) -> None:
        self._max_ends = max_ends
        self._ends: OrderedDict[Hashable, list[_End]] = OrderedDict()
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def arrive(
        self, prompt: Prompt, tenant: str, session: str | None, now_s: float
    ) -> tuple[Mark | None, Followed | None]:
        """Return what a request will be known by, and the one that it follows.

        Args:
            prompt: Its prompt.
            tenant: Who asks.
            session: Its name, if the client gives one.
            now_s: The time, of the clock of `add`.

        Returns:
            `None` for what there is not: a prompt of less than a block is known by nothing.
        """
        end: _End | None
        if session is not None:
            if len(session) > _MAX_NAME:
                session = hashlib.blake2b(session.encode("utf-8", "replace")).hexdigest()
            mark = Mark("session", tenant, (tenant, session))
            end = ends[-1] if (ends := self._ends.get(mark.place)) else None
        elif not len(prompt.keys):
            return None, None
        else:
            # each tenant has names of its own
            salt = np.uint64(hash(tenant) & 0xFFFF_FFFF_FFFF_FFFF)
            names: list[int] = (prompt.keys[-MAX_NEW_BLOCKS:] ^ salt).tolist()
            tail = prompt.content[len(prompt.keys) * prompt.block_bytes :].tobytes()
            mark = Mark("prefix", tenant, names[-1], len(tail), hash(tail))
            end = self._before(prompt, tenant, names)
        if end is None:
            return mark, None
        return mark, Followed(end.key, max(0.0, now_s - end.time_s), mark.by)

    def add(self, mark: Mark, key: str, now_s: float) -> None:
        """A request has been answered.

        Args:
            mark: It, from `arrive`.
            key: Its name.
            now_s: The time; never goes back.
        """
        alike = self._ends.setdefault(mark.place, [])
        self._ends.move_to_end(mark.place)
        self._num -= len(alike)
        alike[:] = [end for end in alike if end.mark != mark][-_MAX_ALIKE + 1 :]
        alike.append(_End(key, now_s, mark))
        self._num += len(alike)
        while self._num > self._max_ends:
            self._num -= len(self._ends.popitem(last=False)[1])

    def _before(self, prompt: Prompt, tenant: str, names: list[int]) -> _End | None:
        """Find the longest prompt that one goes on from, by the names of its last blocks."""
        for back, name in enumerate(reversed(names)):
            if name in self._ends:
                begin = (len(prompt.keys) - back) * prompt.block_bytes
                rest = prompt.content[begin : begin + prompt.block_bytes].tobytes()
                if (end := self._beginning(name, tenant, rest, longer=back > 0)) is not None:
                    return end
        return None

    def _beginning(self, name: int, tenant: str, rest: bytes, *, longer: bool) -> _End | None:
        """Of prompts that have a block as their last, find the longest that goes on like this.

        Args:
            name: Of the block.
            tenant: Who asks.
            rest: What comes after it.
            longer: Whether there is more than the rest.
        """
        found: _End | None = None
        for end in self._ends[name]:
            size = end.mark.tail_bytes
            right = end.mark.tenant == tenant and (longer or size < len(rest))
            if right and hash(rest[:size]) == end.mark.tail_hash:
                if found is None or size > found.mark.tail_bytes:
                    found = end
        return found
