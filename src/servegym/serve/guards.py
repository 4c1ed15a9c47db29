"""When a policy may not decide: the reasons, their counts and the circuit breaker."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from pydantic import BaseModel, ConfigDict, Field


class Reason(StrEnum):
    """Why a decision was made by whom it was made."""

    POLICY = "policy"  # nothing spoke against the policy
    EXPLORED = "explored"  # the policy decided, and another replica was drawn instead
    SHADOW = "shadow"  # the policy is only watched
    CANARY = "canary"  # the request is not in the policy's share
    BREAKER = "breaker"  # the circuit breaker is open
    NO_POLICY = "no_policy"  # none could be loaded
    FORCED = "forced"  # no replica may be chosen: hold if possible, else reject
    SCHEMA = "schema"  # the observation has not the contract's shape
    MISSING = "missing_state"  # engine metrics were never seen
    STALE = "stale_state"  # engine metrics are too old
    NAN = "nan"  # a feature is not finite
    OUT_OF_RANGE = "out_of_range"  # too many features are far from what training has shown
    TIMEOUT = "timeout"  # the policy took too long
    INVALID = "invalid_action"  # the policy chose what is not allowed
    ERROR = "error"  # the policy raised
    LAST_RESORT = "last_resort"  # the fallback itself was of no use


#: The policy's own faults: these open the breaker. The others say something about the state.
FAULTS = frozenset({Reason.TIMEOUT, Reason.INVALID, Reason.ERROR})


class Circuit(IntEnum):
    """State of a breaker."""

    CLOSED = 0  # the policy decides
    OPEN = 1  # the policy is not asked
    HALF_OPEN = 2  # the policy is asked and checked, the fallback acts


class BreakerConfig(BaseModel):
    """When a breaker opens and how it closes again.

    Attributes:
        window_decisions: Latest decisions of the policy that are looked at.
        open_faults: Faults among them that open the breaker.
        cooldown_s: How long it stays open; doubled each time the policy fails on trial.
        max_cooldown_s: The longest it stays open.
        close_successes: Decisions on trial that must all be good before it closes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    window_decisions: int = Field(100, ge=1)
    open_faults: int = Field(5, ge=1)
    cooldown_s: float = Field(10.0, gt=0)
    max_cooldown_s: float = Field(300.0, gt=0)
    close_successes: int = Field(20, ge=1)


class CircuitBreaker:
    """Takes a faulty policy out of service, and back in after it has proved itself.

    The hysteresis: it opens after a few faults in a window, but closes only after a row of good
    decisions made on trial, and waits longer before each new trial.

    Attributes:
        num_opened: How often it has opened.
    """

    def __init__(self, config: BreakerConfig) -> None:
        self.config = config
        self.num_opened = 0
        self._circuit = Circuit.CLOSED
        self._recent: deque[bool] = deque(maxlen=config.window_decisions)
        self._num_faults = 0  # in `_recent`
        self._good_in_row = 0
        self._cooldown_s = config.cooldown_s
        self._open_until_s = -math.inf

    def state(self, now_s: float) -> Circuit:
        """Return what is to be done now; an open breaker whose time is over goes on trial.

        Args:
            now_s: Of any clock that never goes back.
        """
        if self._circuit is Circuit.OPEN and now_s >= self._open_until_s:
            self._circuit = Circuit.HALF_OPEN
            self._good_in_row = 0
        return self._circuit

    def record(self, fault: bool, now_s: float) -> None:
        """Count a decision of the policy, good or faulty."""
        if self._circuit is Circuit.HALF_OPEN:
            if fault:
                self._cooldown_s = min(2.0 * self._cooldown_s, self.config.max_cooldown_s)
                self._open(now_s)
                return
            self._good_in_row += 1
            if self._good_in_row >= self.config.close_successes:
                self.reset()
            return
        if len(self._recent) == self._recent.maxlen:
            self._num_faults -= self._recent[0]
        self._recent.append(fault)
        self._num_faults += fault
        if self._circuit is Circuit.CLOSED and self._num_faults >= self.config.open_faults:
            self._open(now_s)

    def reset(self) -> None:
        """Close it and forget all faults."""
        self._circuit = Circuit.CLOSED
        self._recent.clear()
        self._num_faults = 0
        self._cooldown_s = self.config.cooldown_s

    def _open(self, now_s: float) -> None:
        self._circuit = Circuit.OPEN
        self._open_until_s = now_s + self._cooldown_s
        self._recent.clear()
        self._num_faults = 0
        self.num_opened += 1


class Silence:
    """Notices a policy that is not asked because the state forbids it, time after time.

    Args:
        after: Times in a row that are worth a word; then ten times as many, and so on.

    Attributes:
        num_in_row: Times it was kept out since it was last asked.
        num_noticed: How often `after` was reached.
    """

    def __init__(self, after: int) -> None:
        self.num_in_row = 0
        self.num_noticed = 0
        self._after = after
        self._next = after

    def kept_out(self) -> bool:
        """Count a decision without the policy; return whether it is time to say so."""
        self.num_in_row += 1
        if self.num_in_row < self._next:
            return False
        self.num_noticed += self._next == self._after
        self._next *= 10
        return True

    def asked(self) -> int:
        """Count a decision with it; return how often it was kept out before, if that was said."""
        if not self.num_in_row:  # as a rule
            return 0
        noticed = self.num_in_row if self._next > self._after else 0
        self.reset()
        return noticed

    def reset(self) -> None:
        """Begin anew, as with another policy."""
        self.num_in_row = 0
        self._next = self._after


@dataclass
class Counters:
    """Decisions by reason, and who made them.

    Attributes:
        by_reason: How often each reason was given.
        num_policy: Decisions of the policy that were acted on.
        num_fallback: Decisions of the fallback.
        num_agreed: Decisions of the fallback in which the policy, asked too, chose the same.
        num_differed: Those in which it chose another action.
        num_reloads: Policies put in place of another.
        num_refused: Policies that failed their checks when they should have been.
    """

    by_reason: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(Reason, 0))
    num_policy: int = 0
    num_fallback: int = 0
    num_agreed: int = 0
    num_differed: int = 0
    num_reloads: int = 0
    num_refused: int = 0

    def snapshot(self) -> dict[str, int]:
        """Return all counts by name."""
        counts = {name: value for name, value in vars(self).items() if name.startswith("num_")}
        return {**counts, **{f"reason_{reason}": n for reason, n in self.by_reason.items()}}
