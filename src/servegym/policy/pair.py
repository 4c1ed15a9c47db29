"""A fleet whose engines go by priorities: who dispatches and who orders, as one policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from servegym.policy.ordering import OrderingPolicy
from servegym.policy.policy import Information, Policy


@dataclass(frozen=True)
class Pair:
    """A dispatch policy, and an order that every engine of the fleet goes by.

    Attributes:
        dispatch: Says which replica gets a request.
        order: Says in which order each replica admits and preempts.
        name: Name in tables.
    """

    dispatch: Policy
    order: OrderingPolicy
    name: str

    @property
    def information(self) -> Information:
        """What the one that knows more knows; an oracle's truth is told to both."""
        classes = get_args(Information)
        known = (self.dispatch.information, self.order.information)
        found: Information = max(known, key=classes.index)
        return found
