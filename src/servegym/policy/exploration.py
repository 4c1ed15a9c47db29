"""Exploration with known probabilities: now and then a replica that was not the policy's choice."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import BoolArray


class Explored(NamedTuple):
    """What is done, and how likely it was.

    Attributes:
        action: Index into the mask.
        propensity: Probability that it was to be this one, given the policy's choice and the mask.
    """

    action: int
    propensity: float


def check_share(share: float) -> float:
    """Refuse what is no share.

    Raises:
        ConfigError: If it is outside 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"the explored share must be within 0 to 1, got {share:g}")
    return share


def explore(action: int, mask: BoolArray, share: float, rng: np.random.Generator) -> Explored:
    """Replace a share of choices by replicas drawn evenly from those allowed.

    Holds and rejections stay as they are, and are never drawn: trying them out costs too much.

    Args:
        action: The policy's choice, an index into the mask.
        mask: Allowed actions, `bool[R + 2]`.
        share: Of choices that are replaced; the draw may hit the policy's own again.
        rng: Randomness.
    """
    replicas = mask[:-2]
    if share <= 0.0 or action >= len(replicas):
        return Explored(action, 1.0)
    allowed = np.flatnonzero(replicas)
    done = action if rng.random() >= share else int(rng.choice(allowed))
    return Explored(done, share / len(allowed) + (1.0 - share) * (done == action))
