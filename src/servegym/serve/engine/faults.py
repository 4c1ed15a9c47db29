"""Faults that an emulated fleet makes on command."""

from __future__ import annotations

import math
from dataclasses import dataclass

from servegym.errors import ConfigError, unknown_name

#: What can go wrong, and be put right.
KINDS = {
    "slow": "steps last VALUE times as long",
    "hang": "the engine stands still; the server goes on",
    "fail": "all connections are dropped and none is taken; the cache is lost",
    "drain": "no new requests are taken; /health says 503",
    "metrics-off": "/metrics says 503",
    "metrics-frozen": "/metrics stays as it is now",
    "recover": "all of it ends",
}


@dataclass(frozen=True)
class Fault:
    """Something that happens to a replica.

    Attributes:
        replica: Its index in the scenario.
        kind: One of `KINDS`.
        value: Factor of a slow-down, above 0.
        at_s: Real seconds after the start.
    """

    replica: int
    kind: str
    value: float = 1.0
    at_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("fault", self.kind, KINDS))
        if not 0 < self.value < math.inf:
            raise ConfigError(f"the factor of a slow-down must be above 0, got {self.value}")
        if not 0 <= self.at_s < math.inf:
            raise ConfigError(f"the time of a fault must be at least 0 s, got {self.at_s}")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read `SECONDS:REPLICA:KIND` or, for a slow-down, `SECONDS:REPLICA:slow=FACTOR`.

        Raises:
            ConfigError: If it is neither.
        """
        parts = text.split(":")
        kind, _, value = parts[-1].partition("=")
        try:
            at_s, replica = map(float, parts[:2])
            if len(parts) != 3 or replica != int(replica) or bool(value) != (kind == "slow"):
                raise ValueError
            return cls(int(replica), kind, float(value or 1.0), at_s)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"a fault is SECONDS:REPLICA:KIND, such as 30:0:slow=10 or 60:0:recover, got {text}"
            ) from None
