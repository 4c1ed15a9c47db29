"""Tests of how unevenly uniform routing falls on groups of experts."""

import numpy as np
import pytest

from servegym.costs.routing import fullest_share


def drawn(tokens: int, num_experts: int, active: int, groups: int) -> float:
    """The same by drawing every token's experts."""
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(400):
        chosen = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :active]
        rows = np.bincount((chosen // (num_experts // groups)).ravel(), minlength=groups)
        shares.append(rows.max() / rows.mean())
    return float(np.mean(shares))


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("active", [4, 8])
def test_the_fullest_group_is_as_full_as_drawn_choices_make_it(active, groups):
    assert fullest_share(1, 128, active, groups) == pytest.approx(
        drawn(1, 128, active, groups), rel=0.1
    )
    for tokens in (16, 64):
        assert fullest_share(tokens, 128, active, groups) == pytest.approx(
            drawn(tokens, 128, active, groups), rel=0.025
        )


def test_one_group_has_all_rows_and_many_tokens_fall_evenly():
    assert fullest_share(1, 128, 4, 1) == 1.0
    assert fullest_share(1e6, 128, 4, 8) == pytest.approx(1.0, abs=0.01)


def test_a_token_gives_a_group_no_more_rows_than_it_has_choices():
    assert fullest_share(1, 8, 1, 8) == pytest.approx(8.0)  # all of it falls on one group
    assert fullest_share(1, 2, 2, 2) == 1.0  # every expert is chosen
