"""Least slack first: time left to the limit, less the predicted time to get there."""

from __future__ import annotations

import numpy as np

from servegym.baselines.ordering.edf import demote_hopeless, slack_s
from servegym.policy.ordering import OrderingRule
from servegym.typing import FloatArray


def order(features: FloatArray, memory: FloatArray, params: FloatArray) -> FloatArray:
    """Score; see `policy.ordering`."""
    slack = slack_s(features)
    return demote_hopeless(slack, features) if params[0] > 0.0 else slack


def least_slack(hopeless_last: float = 0.0) -> OrderingRule:
    """Least slack first: time left to the limit, less the predicted time to get there.

    Args:
        hopeless_last: 1 to put requests that cannot meet their limit any more behind all others.
    """
    return OrderingRule(
        "least-slack",
        "predictive",
        order,
        params=np.array([hopeless_last]),
        param_names=("hopeless_last",),
        reference="least slack time first (Mok 1983)",
    )
