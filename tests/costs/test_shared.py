"""What data-parallel ranks do together: taken from a step cost, and by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from servegym.costs.shared import NUM_SHARED_KNOTS, SharedCost
from servegym.errors import ConfigError
from servegym.validate.engine import EngineConstants, EngineSetup

KNOTS = 1.0 + np.arange(NUM_SHARED_KNOTS)
TERMS = SharedCost(
    2,
    KNOTS,
    experts_s=10 * KNOTS,
    skewed_experts_s=30 * KNOTS,
    exchange_s=1000 * KNOTS,
    largest_graph=16,
)


def test_fullest_rank_takes_longer_than_its_share():
    setup = EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B", expert_ranks=2, max_num_seqs=128)
    shared = setup.shared()
    many = (shared.tokens > 1000) & (shared.tokens < 9000)
    assert (shared.skewed_experts_s[many] > 1.1 * shared.experts_s[many]).all()
    assert shared.largest_graph == 256


def test_shared_terms_and_own_work_are_the_whole_step():
    setup = EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B", expert_ranks=2)
    cost, shared = setup.cost(), setup.shared()
    replica = setup.replica(EngineConstants())
    tokens = shared.tokens[40]
    own_s = replica.grid.cpu_s + replica.grid.dense(tokens)
    # two ranks compute half the experts each
    assert own_s + 2 * shared.experts_s[40] == pytest.approx(
        sum(cost.terms(tokens).values()), rel=0.02
    )
    assert shared.exchange_s[40] > 2 * cost.model.layers * cost.operators.all_gather_s(
        2 * 2 * tokens * cost.model.hidden, 2
    )
    assert replica.shared.num_ranks == replica.num_ranks == 2
    assert EngineSetup("RTX-PRO-6000", "Qwen3-30B-A3B").shared() is None


@pytest.mark.parametrize(
    ("tokens", "prefills", "seconds"),
    [
        ([1, 1], False, 1000 * 1 + 10 * 2),
        ([3, 1], False, 1000 * 4 + 10 * 8),  # a graph of 4 on both
        ([9, 2], True, 1000 * 16 + 30 * 32),
        ([17, 2], True, 1000 * 17 + 30 * 19),  # beyond the largest graph: nothing is padded
        ([500, 500], False, 1000 * 500 + 10 * 1000),  # beyond the last knot, with the last slope
    ],
)
def test_exchange_goes_by_the_fullest_rank_and_experts_by_all_tokens(tokens, prefills, seconds):
    assert TERMS.step_s(tokens, prefills=prefills) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_ranks": 0}, "num_ranks must be at least 1, got 0"),
        ({"largest_graph": -1}, "largest_graph must be at least 0, got -1"),
        ({"experts_s": np.ones(2)}, rf"experts_s must have shape \({NUM_SHARED_KNOTS},\)"),
        ({"exchange_s": -KNOTS}, "exchange_s must be finite and not negative"),
        ({"tokens": np.ones(NUM_SHARED_KNOTS)}, "knots tokens must ascend strictly"),
    ],
)
def test_tables_that_are_none_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TERMS, **change)
