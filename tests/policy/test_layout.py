"""The layout of agents: which actions are theirs, and arrays with replicas by row."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.policy.contract import NUM_OBSERVED_FEATURES, NUM_REPLICA_FEATURES
from servegym.policy.layout import agent_actions, agent_arrays, scenario_actions
from servegym.policy.policy import Observations


@pytest.mark.parametrize(
    ("hold", "reject", "actions"),
    [
        (False, False, [0, 1, 2]),
        (True, False, [0, 1, 2, 3]),
        (False, True, [0, 1, 2, 4]),
        (True, True, [0, 1, 2, 3, 4]),
    ],
)
def test_a_scenario_has_the_replicas_and_what_it_allows_besides(hold, reject, actions):
    own = scenario_actions(3, hold=hold, reject=reject)
    assert own.tolist() == actions
    assert own.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        own[0] = 7


@pytest.mark.parametrize(
    ("num_extra", "holds", "actions"),
    [
        (0, True, [0, 1]),
        (1, True, [0, 1, 2]),  # hold, in one of the decisions
        (1, False, [0, 1, 3]),  # nowhere a hold: it must be reject
        (2, True, [0, 1, 2, 3]),
        (2, False, [0, 1, 2, 3]),
    ],
)
def test_one_action_besides_replicas_is_hold_where_a_hold_is_possible(num_extra, holds, actions):
    mask = np.array([[True, False, False, True], [False, True, holds, True]])
    assert agent_actions(mask, num_extra).tolist() == actions


@pytest.mark.parametrize(("num_extra", "actions"), [(1, [0, 1, 2]), (2, [0, 1, 2, 3])])
def test_who_holds_does_not_reject_where_no_hold_is_possible(num_extra, actions):
    mask = np.array([[True, True, False, True]])
    assert agent_actions(mask, num_extra, holds=True).tolist() == actions


def test_agents_see_replicas_by_row_observed_features_and_their_own_actions():
    replicas = np.arange(2.0 * NUM_REPLICA_FEATURES * 3).reshape(2, NUM_REPLICA_FEATURES, 3)
    request = np.array([[1.5, 2.5], [3.5, 4.5]])
    mask = np.array([[True, False, True, False, True], [False, True, True, False, False]])
    seen = Observations(replicas, request, mask)
    shown, asked, allowed = agent_arrays(seen, np.array([0, 1, 2, 4]))
    assert shown.shape == (2, 3, NUM_OBSERVED_FEATURES)
    assert shown[1, 2, 5] == replicas[1, 5, 2]
    assert asked.tolist() == request.tolist()
    assert allowed.tolist() == [[1, 0, 1, 1], [0, 1, 1, 0]]
    assert all(a.dtype == np.float32 for a in (shown, asked, allowed))
    assert shown.flags.c_contiguous  # what ONNX Runtime takes without another copy
