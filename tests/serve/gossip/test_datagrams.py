"""What routers tell each other, as bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servegym.serve.gossip.datagrams import (
    MAX_BYTES,
    MAX_ENTRIES,
    BadDatagramError,
    Head,
    entries_of,
    key_of,
    read,
    write,
)

SECRET = b"sixteen letters!"
HEAD = Head(2**63, 7 << 16, 5, 6 << 16, 2.5, 3)


def counters(count):
    return np.arange(5.0 * count).reshape(5, count)


def test_a_datagram_is_read_as_it_was_written():
    (piece,) = entries_of([key_of("a"), key_of("b")], counters(2))
    said = read(write(HEAD, piece, SECRET), SECRET)
    assert said.head == HEAD
    assert said.keys.tolist() == [key_of("a"), key_of("b")]
    assert said.counters.tolist() == counters(2).tolist()


def test_a_fleet_of_512_is_told_in_datagrams_of_one_packet_each():
    keys = [key_of(f"replica-{i}") for i in range(512)]
    pieces = entries_of(keys, counters(512))
    datagrams = [write(HEAD, piece, SECRET) for piece in pieces]
    assert len(datagrams) == 13  # 40 replicas of 28 bytes, with 48 bytes before and 16 behind them
    assert MAX_ENTRIES == 40
    assert max(map(len, datagrams)) == 1184 <= MAX_BYTES
    told = [read(data, SECRET) for data in datagrams]
    assert [key for said in told for key in said.keys.tolist()] == keys
    assert np.hstack([said.counters for said in told]).tolist() == counters(512).tolist()


def test_counters_are_whole_numbers_that_fit():
    values = np.array([[-0.4], [2.5e10], [1.6], [0.0], [7.0]])
    (piece,) = entries_of([1], values)
    assert read(write(HEAD, piece, b""), b"").counters[:, 0].tolist() == [0, 2**32 - 1, 2, 0, 7]


def test_who_has_no_replica_says_so():
    assert entries_of([], np.zeros((5, 0))) == [b""]
    assert len(read(write(HEAD, b"", SECRET), SECRET).keys) == 0


def test_another_secret_is_refused():
    with pytest.raises(BadDatagramError, match="secret"):
        read(write(HEAD, b"", SECRET), b"another secret!!")


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_a_rate_that_is_none_is_garbage(rate):
    with pytest.raises(BadDatagramError, match="garbage"):
        read(write(HEAD._replace(arrival_rate_rps=rate), b"", SECRET), SECRET)


def test_half_an_entry_is_garbage():
    with pytest.raises(BadDatagramError, match="garbage"):
        read(write(HEAD, b"\0" * 27, SECRET), SECRET)


def test_another_version_is_told_from_garbage():
    data = bytearray(write(HEAD, b"", SECRET))
    data[4] = 2
    with pytest.raises(BadDatagramError, match="version"):
        read(bytes(data), SECRET)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=1500))
def test_no_garbage_is_read(data):
    with pytest.raises(BadDatagramError):
        read(data, SECRET)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 64 + 28 - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place, change):
    data = bytearray(write(HEAD, entries_of([1], np.ones((5, 1)))[0], SECRET))
    data[place] ^= change
    with pytest.raises(BadDatagramError):
        read(bytes(data), SECRET)
