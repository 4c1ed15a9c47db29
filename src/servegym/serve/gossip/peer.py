"""One other router, as this one knows it.

What counts is fresh, and no clocks are compared to know that: a datagram names the last one that
its sender has had from here, and it cannot be older than that one is by the clock of this machine.
So whoever records datagrams can bring nothing back that is older than `forget_after_s`, and within
that time a sender's sequence numbers only grow.
"""

from __future__ import annotations

import numpy as np

from servegym.serve.gossip.datagrams import PART_BITS, Datagram
from servegym.serve.state import COUNTED
from servegym.typing import FloatArray, IntArray

#: Starts of a router that are remembered, so that nothing of an earlier one comes back.
_MAX_SENDERS = 8


class Peer:
    """What another router has said.

    Args:
        num_slots: Places for replicas.

    Attributes:
        sender: Number of the router that is heard here, 0: none has been.
        sequence: Of its last datagram.
        stranger: Number and sequence of another that has spoken from here and has yet to show that
            it hears this router, if one has.
        heard_s: When what it said last was true, at the earliest; -inf before.
        arrival_rate_rps: What comes to it.
        num_held: Requests that it holds.
        num_taken: Datagrams that counted.
    """

    def __init__(self, num_slots: int) -> None:
        self.sender = 0
        self.sequence = 0
        self.stranger: tuple[int, int] | None = None
        self.heard_s = -np.inf
        self.arrival_rate_rps = 0.0
        self.num_held = 0
        self.num_taken = 0
        self.is_heard = False  # as has been logged
        self._earlier: dict[int, int] = {}  # last sequence numbers, by sender
        self._counters = np.zeros((len(COUNTED), num_slots))
        self._counted_s = np.full(num_slots, -np.inf)

    def take(self, said: Datagram, slots: IntArray, sent_s: float | None) -> str:
        """Take a datagram in.

        Args:
            said: The datagram.
            slots: Of its replicas, -1: not known here.
            sent_s: When the datagram from here left that it names; `None`: it names none of late.

        Returns:
            `taken`; `hello`, of one that has not heard from here of late; or `replayed`.
        """
        head = said.head
        last = self._earlier.get(head.sender, -1)
        if head.sequence <= last:
            return "replayed"
        if sent_s is None:
            if head.sender == self.sender:
                self.sequence = self._earlier[head.sender] = head.sequence
            elif last < 0:
                self.stranger = head.sender, head.sequence
            return "hello"
        if head.sender != self.sender and last >= 0:
            return "replayed"  # of a start before the present one
        if head.sender != self.sender:
            self._begin(head.sender)
        self.sequence = self._earlier[head.sender] = head.sequence
        self.heard_s = max(self.heard_s, sent_s)
        self.arrival_rate_rps, self.num_held = head.arrival_rate_rps, head.num_held
        self.num_taken += 1
        known = slots >= 0
        self._counters[:, slots[known]] = said.counters[:, known]
        self._counted_s[slots[known]] = sent_s
        return "taken"

    def counters(self, since_s: float) -> FloatArray:
        """Return its counters by slot, those that are older than a time as 0, `float64[5, W]`."""
        return np.where(self._counted_s >= since_s, self._counters, 0.0)

    def move(self, slots: IntArray) -> None:
        """The fleet has changed.

        Args:
            slots: For each slot of now the one that its replica had, -1: it is new, `int[W]`.
        """
        counters, counted_s = self._counters, self._counted_s
        self._counters = np.zeros((len(COUNTED), len(slots)))
        self._counted_s = np.full(len(slots), -np.inf)
        stay = slots >= 0
        self._counters[:, stay] = counters[:, slots[stay]]
        self._counted_s[stay] = counted_s[slots[stay]]

    def _begin(self, sender: int) -> None:
        """Another start of the router is heard: it has nothing of what the one before had."""
        self.sender, self.stranger = sender, None
        self._counted_s[:] = -np.inf
        self._earlier[sender] = -1
        while len(self._earlier) > _MAX_SENDERS:
            del self._earlier[next(iter(self._earlier))]


def round_of(sequence: int) -> int:
    """Return the round that a datagram was sent in."""
    return sequence >> PART_BITS
