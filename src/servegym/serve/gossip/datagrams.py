"""What routers tell each other, as bytes: one datagram says all it has to say by itself.

A datagram is a head, entries of replicas, and a code (HMAC-SHA-256 over all before it, its first
half: RFC 2104 allows that). It fits the smallest packet that IPv6 must carry (1280 bytes, RFC
8200), so none is split on its way; a fleet that does not fit one is told in several. Counts are
absolute, so a lost datagram is made good by the next.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.errors import ServeGymError
from servegym.serve.state import COUNTED
from servegym.typing import FloatArray

#: Changes with whatever is read otherwise.
VERSION = 1
MAX_BYTES = 1200
_MAGIC = b"sgym"
# magic, version; sender, sequence; addressee, the last sequence heard of it; rate, requests on hold
_HEAD = struct.Struct("<4sB3xQQQQfI")
_ENTRY = np.dtype([("key", "<u8"), ("counters", "<u4", (len(COUNTED),))])
_CODE_BYTES = 16
#: Replicas in a datagram.
MAX_ENTRIES = (MAX_BYTES - _HEAD.size - _CODE_BYTES) // _ENTRY.itemsize
#: A sequence number is that of a round, shifted by so much, and that of a datagram in it.
PART_BITS = 16
_LARGEST = 2.0**32 - 1.0


class BadDatagramError(ServeGymError):
    """Raised when a datagram cannot be what a router has sent.

    Attributes:
        reason: `garbage`, `version` or `secret`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"a datagram is bad: {reason}")
        self.reason = reason


class Head(NamedTuple):
    """What a datagram says beside its entries.

    Attributes:
        sender: Number that the router drew when it started.
        sequence: Grows with every datagram of the sender.
        addressee: Number of the router it is for, as far as the sender knows; else 0.
        echo: Last sequence number that the sender has had from the addressee.
        arrival_rate_rps: Requests that come to the sender.
        num_held: Requests that it holds.
    """

    sender: int
    sequence: int
    addressee: int
    echo: int
    arrival_rate_rps: float
    num_held: int


class Datagram(NamedTuple):
    """One datagram.

    Attributes:
        head: Who says it, to whom.
        keys: Of replicas, `uint64[n]`; see `key_of`.
        counters: Of the sender's requests there (`serve.state.COUNTED`), `float64[5, n]`.
    """

    head: Head
    keys: NDArray[np.uint64]
    counters: FloatArray


def key_of(name: str) -> int:
    """Return what stands for a replica's name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def entries_of(keys: Sequence[int], counters: FloatArray) -> list[bytes]:
    """Write replicas, as many to a piece as a datagram holds; at least one piece.

    Args:
        keys: Of the replicas.
        counters: `float64[5, n]`; written as whole numbers.
    """
    entries = np.zeros(len(keys), _ENTRY)
    entries["key"] = np.array(keys, np.uint64)
    entries["counters"] = np.clip(np.rint(counters.T), 0.0, _LARGEST)
    begins = range(0, max(1, len(keys)), MAX_ENTRIES)
    return [entries[begin : begin + MAX_ENTRIES].tobytes() for begin in begins]


def write(head: Head, entries: bytes, secret: bytes) -> bytes:
    """Write a datagram; `entries` is a piece that `entries_of` made."""
    data = _HEAD.pack(_MAGIC, VERSION, *head) + entries
    return data + _code(data, secret)


def read(data: bytes, secret: bytes) -> Datagram:
    """Read a datagram.

    Raises:
        BadDatagramError: If it is none, of another version, or made with another secret.
    """
    size = len(data) - _HEAD.size - _CODE_BYTES
    if size < 0 or len(data) > MAX_BYTES or not data.startswith(_MAGIC):
        raise BadDatagramError("garbage")
    if data[len(_MAGIC)] != VERSION:
        raise BadDatagramError("version")
    if not hmac.compare_digest(_code(data[:-_CODE_BYTES], secret), data[-_CODE_BYTES:]):
        raise BadDatagramError("secret")
    head = Head(*_HEAD.unpack_from(data)[2:])
    if size % _ENTRY.itemsize or not 0.0 <= head.arrival_rate_rps < math.inf:
        raise BadDatagramError("garbage")
    found = np.frombuffer(data, _ENTRY, size // _ENTRY.itemsize, _HEAD.size)
    return Datagram(head, found["key"].astype(np.uint64), found["counters"].T.astype(np.float64))


def _code(data: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, data, "sha256")[:_CODE_BYTES]
