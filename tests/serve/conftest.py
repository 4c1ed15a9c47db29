"""Fixtures of the router's tests."""

from __future__ import annotations

from functools import partial

import pytest

from .running import running


@pytest.fixture(params=[0, 1], ids=["one process", "a worker"])
def start(request):
    """What starts a router: `running`, whoever carries its requests."""
    return partial(running, num_workers=request.param)
