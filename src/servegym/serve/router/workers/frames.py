"""What workers and the decider say to each other, as bytes.

A packet is what one side writes at once: its length, the time it was written, and frames. A frame
is its length, its kind, the ticket of the request that it is about (0: none), and a body. Bodies
are pickles: both ends are one program, forked from one process, on a socket in a folder that no
other user can open. Tokens, of which there are most, are records of fixed size, many to a frame.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from servegym.serve.requests.prompt import Prompt, Size
from servegym.serve.requests.recent_ends import MAX_NEW_BLOCKS
from servegym.serve.router.placement import Arrival

_PACKET = struct.Struct("<Id")  # bytes after it; when it was written
_FRAME = struct.Struct("<IBI")  # bytes after it; kind; ticket
_TOKENS = struct.Struct("<IId")  # ticket; how many; when they came


class Kind(IntEnum):
    """Of a frame; the first group is said by workers, the second by the decider."""

    HELLO = 1
    ENTER = 2
    ADMIT = 3
    ARRIVE = 4  # and place it
    PLACE = 5
    FAILED = 6
    BEGIN = 7
    TOKENS = 8
    PAUSED = 9
    RESUMED = 10
    ANSWERED = 11
    BROKE = 12
    CLOSE = 13
    LEAVE = 14
    COUNT = 15
    PAGE = 16
    LAG = 17
    LEFT = 18
    PREFILLED = 19
    PREFILLED_BESIDE = 20
    MOVE = 21

    KEYS = 32
    ADMITTED = 33
    REFUSED = 34
    PLACED = 35
    VERDICT = 36
    SHOWN = 37
    LEAVING = 38
    MOVED = 39


#: One thing that was said: a `Kind`, the ticket of the request that it is about (0: of none), and a
#: body; see `unpack`.
Frame = tuple[int, int, bytes]


class Packet(NamedTuple):
    """What was written at once.

    Attributes:
        written_s: When, on the clock that all processes of a machine share.
        frames: In order.
    """

    written_s: float
    frames: list[Frame]


def write_frame(kind: Kind, ticket: int, body: bytes = b"") -> bytes:
    """Write a frame."""
    return _FRAME.pack(len(body), kind, ticket) + body


def write_packet(written_s: float, frames: Iterable[bytes]) -> bytes:
    """Write a packet."""
    data = b"".join(frames)
    return _PACKET.pack(len(data), written_s) + data


def read_packets(data: bytes) -> tuple[list[Packet], bytes]:
    """Read the packets that are whole; return them and what follows."""
    packets, at = [], 0
    while len(data) - at >= _PACKET.size:
        size, written_s = _PACKET.unpack_from(data, at)
        end = at + _PACKET.size + size
        if end > len(data):
            break
        packets.append(Packet(written_s, _frames(data, at + _PACKET.size, end)))
        at = end
    return packets, data[at:]


def pack(*what: object) -> bytes:
    """Write a body."""
    return pickle.dumps(what, pickle.HIGHEST_PROTOCOL)


def unpack(body: bytes) -> Any:
    """Return what `pack` was given."""
    return pickle.loads(body)


def token_record(ticket: int, count: int, now_s: float) -> bytes:
    """Write that tokens have come."""
    return _TOKENS.pack(ticket, count, now_s)


def token_records(body: bytes) -> Iterator[tuple[int, int, float]]:
    """Read records of tokens: ticket, how many, when they came."""
    return _TOKENS.iter_unpack(body)


def pack_arrival(arrival: Arrival, *, content: bool) -> bytes:
    """Write an arrival.

    Args:
        arrival: Of a request.
        content: Whether what follows what will be looked for in the decision log: then the end of
            the prompt's content goes along, as far back as `requests.recent_ends` looks.
    """
    prompt = arrival.prompt
    if isinstance(prompt, Size):
        return pack(prompt, arrival[1:])
    begin = max(0, len(prompt.keys) - MAX_NEW_BLOCKS) * prompt.block_bytes
    end = prompt.content[begin:].tobytes() if content else b""
    lengths = prompt[0], *prompt[2:6]  # of its fields; between them are its keys
    return pack(prompt.keys.tobytes(), lengths, prompt.block_bytes, begin, end, arrival[1:])


def unpack_arrival(body: bytes) -> Arrival:
    """Read what `pack_arrival` wrote; content that did not come along is of any value."""
    read = unpack(body)
    if len(read) == 2:
        return Arrival(read[0], *read[1])
    keys, lengths, block_bytes, begin, end, others = read
    content = np.empty(begin + len(end) if end else 0, np.uint8)
    content[len(content) - len(end) :] = np.frombuffer(end, np.uint8)
    named = np.frombuffer(keys, np.uint64)
    prompt = Prompt._make((lengths[0], named, *lengths[1:], content, block_bytes))
    return Arrival(prompt, *others)


def _frames(data: bytes, at: int, end: int) -> list[Frame]:
    found = []
    while at < end:
        size, kind, ticket = _FRAME.unpack_from(data, at)
        begin = at + _FRAME.size
        at = begin + size
        found.append((kind, ticket, data[begin:at]))
    return found
