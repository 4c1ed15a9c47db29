"""Exploration: the probabilities that are stated are those with which things are done."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.errors import ConfigError
from servegym.policy.exploration import check_share, explore

#: Replicas 0 and 2 of three, a hold, no rejection.
MASK = np.array([True, False, True, True, False])


def test_what_is_done_has_the_probability_that_is_stated():
    rng = np.random.default_rng(0)
    drawn = [explore(2, MASK, 0.4, rng) for _ in range(20_000)]
    stated = dict(drawn)
    assert stated == pytest.approx({0: 0.2, 2: 0.8})
    found = {a: np.mean([x.action == a for x in drawn]) for a in stated}
    assert found == pytest.approx(stated, abs=0.01)  # 3.5 standard deviations


def test_nothing_is_explored_without_a_share_nor_in_place_of_a_hold():
    rng = np.random.default_rng(0)
    assert explore(2, MASK, 0.0, rng) == (2, 1.0)
    assert {explore(3, MASK, 1.0, rng) for _ in range(20)} == {(3, 1.0)}


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ConfigError, match="must be within 0 to 1, got"):
        check_share(share)
