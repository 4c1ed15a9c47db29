"""KV on its way between replicas, as far as a router can know it: the features of roles.

The rows mean what `policy.roles` fills them with. A router does not see a transfer: it counts KV as
fetched when the first token comes from where the request decodes, and takes links to be as busy as
their known rates make them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from servegym.cluster.spec import Role
from servegym.policy.contract import (
    ARRIVING_TOKENS,
    DECODES,
    HAS_PREFILL,
    KV_TOKENS_PER_S,
    LINK_BUSY_S,
    NUM_HOLDING,
    PREFILLS,
)
from servegym.serve.live_request import LiveRequest
from servegym.serve.state import LiveState
from servegym.typing import BoolArray


@dataclass(slots=True, eq=False)
class Moving:
    """A request that is prefilled on one replica and decodes on another.

    Attributes:
        source: Slot of the replica that prefills it.
        leg: It in the counters of that replica, until its prefill is over.
        holds: Whether it is prefilled, and its KV not known to be fetched.
        target: Slot of the replica where it decodes, -1: none yet.
    """

    source: int
    leg: LiveRequest | None
    holds: bool = False
    target: int = -1


class _Links(NamedTuple):
    """When a replica's links are free, seconds of the state's clock."""

    out_s: float = 0.0
    in_s: float = 0.0


class Transfers:
    """Roles of the replicas, and the requests that are between two of them.

    Args:
        state: Whose rows are filled.
    """

    def __init__(self, state: LiveState) -> None:
        self._state = state
        self._links: dict[int, _Links] = {}  # of replicas that have a role, or move KV

    @property
    def are_possible(self) -> bool:
        """Whether a replica has another role than `mixed`, or moves KV."""
        return bool(self._links)

    @property
    def prefilling(self) -> BoolArray:
        """Replicas that may be sent a request to prefill, `bool[W]`."""
        return self._state.replicas[PREFILLS] > 0.0

    @property
    def decoding(self) -> BoolArray:
        """Replicas where requests decode, `bool[W]`."""
        return self._state.replicas[DECODES] > 0.0

    def set_role(self, slot: int, role: Role, kv_tokens_per_s: float) -> None:
        """A replica does only a part of a request, or moves KV at a known rate.

        Args:
            slot: Of the replica.
            role: What it does.
            kv_tokens_per_s: Tokens whose KV its link moves in a second, 0: not known.
        """
        rows = self._state.replicas
        rows[PREFILLS, slot], rows[DECODES, slot] = role != "decode", role != "prefill"
        rows[KV_TOKENS_PER_S, slot] = kv_tokens_per_s
        if role != "mixed" or kv_tokens_per_s:
            self._links[slot] = _Links()
        else:
            self._links.pop(slot, None)

    def forget(self, slot: int) -> None:
        """A replica has gone, after its last request."""
        self._links.pop(slot, None)

    def role(self, slot: int) -> Role:
        """Return what a replica does of a request."""
        rows = self._state.replicas
        if not rows[DECODES, slot]:
            return "prefill"
        return "mixed" if rows[PREFILLS, slot] else "decode"

    def only_prefills(self, slot: int) -> bool:
        """Whether what a replica gets decodes elsewhere."""
        return not self._state.replicas[DECODES, slot]

    def is_holding(self, slot: int) -> bool:
        """Whether KV of requests waits at a replica to be fetched, or comes to it."""
        return bool(self._state.replicas[NUM_HOLDING, slot])

    def see(self, moving: Moving | None, now_s: float) -> None:
        """Fill the rows that time changes, for a decision about a request.

        Args:
            moving: The request, if it is prefilled elsewhere; `None`: it is to be dispatched.
            now_s: The time.
        """
        rows = self._state.replicas
        rows[HAS_PREFILL] = 0.0
        if moving is not None:
            rows[HAS_PREFILL, moving.source] = 1.0
        for slot, links in self._links.items():
            rows[LINK_BUSY_S, slot] = max(0.0, links.out_s - now_s, links.in_s - now_s)

    def begin(self, request: LiveRequest, source: int, now_s: float) -> Moving:
        """A request goes to a replica that prefills it, whose counters have it until that is over.

        Args:
            request: At no replica; `LiveState.observe` has just described the choice.
            source: Slot of the replica.
            now_s: The time.
        """
        leg = LiveRequest(
            request.key,
            request.arrival_s,
            request.prompt_tokens,
            request.predicted_output_tokens,
            request.slo_class,
        )
        self._state.leave(request)  # if it was on hold, it is no more
        self._state.dispatch(leg, source, now_s)
        return Moving(source, leg)

    def prefilled(self, moving: Moving) -> None:
        """The prefill is over; its KV waits to be fetched. Does nothing the second time."""
        if moving.leg is not None:
            self._state.leave(moving.leg)
            moving.leg = None
            moving.holds = True
            self._state.replicas[NUM_HOLDING, moving.source] += 1.0

    def place(self, moving: Moving, request: LiveRequest, target: int, now_s: float) -> None:
        """It has been chosen where the request decodes.

        Args:
            moving: The request on its way.
            request: It in the state, at no replica; `LiveState.observe` has described the choice.
            target: Slot of the replica.
            now_s: The time.
        """
        state, rows = self._state, self._state.replicas
        state.dispatch(request, target, now_s)
        state.end_prefill(request)  # all of its prompt is computed elsewhere
        moving.target = target
        rows[NUM_HOLDING, target] += 1.0
        rows[ARRIVING_TOKENS, target] += request.prompt_tokens
        source = moving.source
        if wait_s := self._moving_s(moving, request):
            out, into = self._links[source], self._links[target]
            free_s = max(now_s, out.out_s, into.in_s) + wait_s
            self._links[source] = out._replace(out_s=free_s)
            self._links[target] = into._replace(in_s=free_s)

    def landed(self, moving: Moving, request: LiveRequest) -> None:
        """Its KV has been fetched, or is given up: neither end holds memory for it any longer."""
        self.prefilled(moving)
        rows = self._state.replicas
        if moving.holds:
            moving.holds = False
            rows[NUM_HOLDING, moving.source] -= 1.0
        if moving.target >= 0:
            rows[NUM_HOLDING, moving.target] -= 1.0
            rows[ARRIVING_TOKENS, moving.target] -= request.prompt_tokens
            if not rows[NUM_HOLDING, moving.target]:
                rows[ARRIVING_TOKENS, moving.target] = 0.0  # no rounding left behind
            moving.target = -1

    def left_s(self, moving: Moving, now_s: float) -> float:
        """Seconds until its KV should have come to where it decodes, as far as is known."""
        links = self._links.get(moving.target, _Links())
        return max(0.0, links.in_s - now_s)

    def _moving_s(self, moving: Moving, request: LiveRequest) -> float:
        """Seconds that its KV takes alone, 0 where a rate is not known."""
        rows = self._state.replicas
        ends = (moving.source, moving.target)
        if not all(slot in self._links for slot in ends):
            return 0.0
        rate = float(min(rows[KV_TOKENS_PER_S, slot] for slot in ends))
        return (request.prompt_tokens - request.believed_cached) / rate if rate > 0.0 else 0.0
