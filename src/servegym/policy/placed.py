"""A fleet that is disaggregated: who dispatches and who places, as one policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from servegym.policy.contract import Group
from servegym.policy.policy import Heuristic, Information, Observations, Policy
from servegym.typing import IntArray


@dataclass(frozen=True)
class Placed:
    """A dispatch policy, and a rule for where what is prefilled elsewhere decodes.

    As a `Policy` it dispatches; `policy.run_placed` asks the rule.

    Attributes:
        dispatch: Says which replica gets a request: one that prefills it, or does all of it.
        place: Says where it decodes, of the replicas that may.
        name: Name in tables.
        learned: Whether both were learned, as one.
    """

    dispatch: Policy
    place: Heuristic
    name: str
    learned: bool = False

    @property
    def information(self) -> Information:
        """What the one that knows more knows; an oracle's truth is told to both."""
        classes = get_args(Information)
        known = (self.dispatch.information, self.place.information)
        found: Information = max(known, key=classes.index)
        return found

    @property
    def needs(self) -> Group:
        """Feature groups that either reads."""
        return self.dispatch.needs | self.place.needs

    def reset(self, num_envs: int, seed: int) -> None:
        """See `Policy.reset`."""
        self.dispatch.reset(num_envs, seed)
        self.place.reset(num_envs, seed + 1)

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Dispatch; see `Policy.act`."""
        return self.dispatch.act(observations, env_ids)
