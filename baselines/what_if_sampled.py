"""Forward simulation of each choice over likely output lengths: least time added to all there.

As `what-if-added`, but the lengths of all outputs are drawn from what their predictions and the
tokens that are out leave open, and a cached prefix has its price: see `policy.counterfactual`, the
teacher of the dispatchers that learn from it. Slow, and a bar for what is learned.
"""

from __future__ import annotations

from servegym.baselines.what_if_added import decide
from servegym.policy.contract import Group
from servegym.policy.policy import Heuristic


def what_if_sampled() -> Heuristic:
    """Forward simulation of each choice over likely lengths: least time added to all there."""
    return Heuristic(
        name="what-if-sampled",
        information="predictive",
        needs=Group.COUNTERS | Group.WHAT_IF | Group.SAMPLED,
        decide=decide,
        reference="",
    )
