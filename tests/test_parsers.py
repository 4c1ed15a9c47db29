"""No bytes break a reader of what engines, clients and files send, or take more than their length.

A million such inputs: `python benchmarks/fuzz_parsers.py`.
"""

from __future__ import annotations

import random
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .serve.linear import cpu_limit

FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "fuzz_parsers.py"))
TARGETS, REFUSALS = FUZZ["TARGETS"], FUZZ["REFUSALS"]


def read(name: str, data: bytes) -> bool:
    try:
        TARGETS[name].read(data)
    except REFUSALS:
        return False
    return True


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_good_is_taken(name):
    assert TARGETS[name].good
    for data in TARGETS[name].good:
        if b"timestamp" not in data or b"hash_ids" in data:
            assert read(name, data), data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=300)
@given(st.integers(0, 2**64 - 1))
def test_no_change_of_a_good_input_breaks_a_reader(name, seed):
    read(name, FUZZ["mutated"](random.Random(seed), TARGETS[name]))


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=30)
@given(st.binary(max_size=200))
def test_no_bytes_break_a_reader(name, data):
    read(name, data)


@pytest.mark.parametrize("name", TARGETS)
def test_no_run_costs_more_than_its_length(name):
    target = TARGETS[name]
    good = target.good[0]
    for word in target.words:
        with cpu_limit():
            read(name, good[: len(good) // 2] + word * (100_000 // len(word)) + good)
