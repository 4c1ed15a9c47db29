"""The clairvoyant bound: whose next turn comes last lets go first."""

from __future__ import annotations

from servegym.cluster.state import KEEP
from servegym.errors import ConfigError
from servegym.policy.retention import RetentionRule, Turn

#: Beyond the end of any episode; retained turns let go by the least time left.
_FAR_S = 1e9


def belady() -> RetentionRule:
    """Keep everything; where memory is short the turn whose next one comes last lets go first."""

    def retain(turn: Turn) -> tuple[int, float]:
        if not turn.back_s >= 0.0:
            raise ConfigError(
                "belady must know when the next turn comes, which only a simulator can tell: "
                "choose another retention rule"
            )
        # its time is over at _FAR_S - (now + back), the sooner the later it is back
        return KEEP, _FAR_S - 2.0 * turn.now_s - turn.back_s

    return RetentionRule("belady", "oracle", retain, "Belady 1966")
