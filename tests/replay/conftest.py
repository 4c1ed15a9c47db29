"""Logs of a fleet that is what its cost model says, and of one that is not."""

from __future__ import annotations

import pytest

from .live import play_live, scenario, slower
from .reading import drift_of


@pytest.fixture(scope="package")
def exact(tmp_path_factory):
    """The fleet is as its model says, step by step."""
    folder = tmp_path_factory.mktemp("exact")
    play_live(folder, scenario(), num_requests=400, max_file_rows=150, observations=True)
    return folder


@pytest.fixture(scope="package")
def noisy(tmp_path_factory):
    """The fleet is as its model says on average."""
    folder = tmp_path_factory.mktemp("noisy")
    play_live(folder, scenario(), num_requests=1500, noise=0.05)
    return folder


@pytest.fixture(scope="package")
def slowed(tmp_path_factory):
    """Decodes of the second replica take 1.3 times as long from 60 s on."""
    folder = tmp_path_factory.mktemp("slowed")
    play_live(
        folder,
        scenario(),
        num_requests=1800,
        noise=0.05,
        distorted={1: slower(1.3, 1.3, 1.0)},
        from_s=60.0,
    )
    return folder


@pytest.fixture(scope="package")
def slowed_drift(slowed):
    return drift_of(slowed)


@pytest.fixture(scope="package")
def noisy_drift(noisy):
    return drift_of(noisy)
