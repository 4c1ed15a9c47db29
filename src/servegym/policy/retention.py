"""What becomes of the KV of ended turns: what a rule may know, and a dispatch policy with one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, get_args

from servegym.policy.contract import Group
from servegym.policy.policy import Information, Observations, Policy
from servegym.typing import FloatArray, IntArray


class Turn(NamedTuple):
    """A turn that has ended, when it is decided what becomes of its KV.

    Attributes:
        now_s: Time, seconds.
        kept_tokens: Of its text, in full blocks of the prefix cache.
        kv_share: Of the replica's blocks, that these are.
        recompute_s: Seconds that computing them alone takes.
        tiered: Whether there are tiers to which they can be written.
        tool: What its session waits for, a number; -1 where nobody says it.
        gaps_s: Seconds from such turns' ends to the next ones, as far as these have come, the
            latest last, `float64[n]`.
        back_s: From now to the next turn; NaN for those who do not know the future.
        free_share: Of the replica's blocks, that no request holds and no turn keeps.
        num_waiting: Requests in its queue.
        host_share: Of its first tier, that is filled; 0 without one.
        writing_s: Seconds until its tiers have what was sent to them.
    """

    now_s: float
    kept_tokens: int
    kv_share: float
    recompute_s: float
    tiered: bool
    tool: int
    gaps_s: FloatArray
    back_s: float
    free_share: float = 0.0
    num_waiting: int = 0
    host_share: float = 0.0
    writing_s: float = 0.0


#: Says what becomes of a turn's KV (`state.DROP` and the others), and how long `KEEP` keeps it.
Retain = Callable[[Turn], tuple[int, float]]


@dataclass(frozen=True)
class RetentionRule:
    """A rule for what becomes of the KV of turns that another request waits for.

    Attributes:
        name: Name in tables.
        information: What it may know; an oracle knows when the next turn comes.
        retain: The rule.
        reference: Where it comes from.
        learned: Whether it was.
        weights: Of a learned one, by which compiled code decides as `retain` does: see
            `policy.turn_scores`, `float64[4, NUM_TURN_TERMS]`.
    """

    name: str
    information: Information
    retain: Retain
    reference: str = ""
    learned: bool = False
    weights: FloatArray | None = None


@dataclass(frozen=True)
class Kept:
    """A dispatch policy, and a rule for what becomes of the KV of ended turns.

    As a `Policy` it dispatches; `policy.run_kept` asks the rule.

    Attributes:
        dispatch: Says which replica gets a request.
        retention: Says what becomes of its KV when it has ended.
        name: Name in tables.
    """

    dispatch: Policy
    retention: RetentionRule
    name: str

    @property
    def information(self) -> Information:
        """What the one that knows more knows."""
        classes = get_args(Information)
        known = (self.dispatch.information, self.retention.information)
        found: Information = max(known, key=classes.index)
        return found

    @property
    def needs(self) -> Group:
        """Feature groups that the dispatch policy reads."""
        return self.dispatch.needs

    def reset(self, num_envs: int, seed: int) -> None:
        """See `Policy.reset`."""
        self.dispatch.reset(num_envs, seed)

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Dispatch; see `Policy.act`."""
        return self.dispatch.act(observations, env_ids)
