"""The same examples on every machine: a failure is a change, not luck."""

from __future__ import annotations

import os
import signal
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from numba import config as numba_config

# what is compiled depends on what is in the cache: tests of what a program says are not about it
os.environ["SERVEGYM_COMPILE_NOTICE"] = "0"
# beside another worker, threads of PyTorch wait for each other: ten times as long as they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("servegym", derandomize=True, deadline=None)
settings.load_profile("servegym")


def pytest_configure(config: pytest.Config) -> None:
    """Let workers take files in the order below, not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with slow files, and end with small ones: no worker is left alone with a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    size = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -size[item.path]))


@pytest.fixture(autouse=True)
def _ctrl_c_stays():
    """Fail whoever leaves a handler behind: Ctrl-C would do nothing in what comes after."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    if after != before:
        signal.signal(signal.SIGINT, before)
    assert after == before


def _let_records_be_read_by_attribute() -> None:
    """Make what the cluster's kernels do with records work in Python.

    NumPy's own records know their fields by name only.
    """
    from servegym.cluster import allocate

    def readable(make):
        def make_readable(*args, **settings):
            made = make(*args, **settings)
            return made._replace(
                **{
                    name: part.view(np.recarray)
                    for name, part in made._asdict().items()
                    if isinstance(part, np.ndarray) and part.dtype.names
                }
            )

        return make_readable

    allocate.make_params = readable(allocate.make_params)
    allocate.make_state = readable(allocate.make_state)


if numba_config.DISABLE_JIT:
    _let_records_be_read_by_attribute()
