"""Where environments are in their sequences of episodes, so that an interrupted run goes on there.

The requests of an episode depend on the seed, the environment and the number of the episode, and
all else on the actions: it is enough to keep those of the episodes that are being played.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from servegym.typing import BoolArray, IntArray

_FIRST_LENGTH = 256


class Batch(Protocol):
    """What is brought to a place: the environments of `envs.batch`."""

    num_envs: int

    def skip_to(self, episodes: IntArray) -> None:
        """Pass over episodes: the next that each environment draws is that of this number."""
        ...

    def reset(self, envs: IntArray) -> None:
        """Begin the next episode of these environments."""
        ...

    def step(self, actions: IntArray, active: BoolArray) -> None:
        """Take an action in each environment that is active."""
        ...


class Places:
    """Which episode each environment plays, and what was done in it.

    Args:
        episodes: Number of each environment's episode in its sequence, `int64[num_envs]`.
        taken: Actions in it, for each environment, `int16[steps]`.

    Attributes:
        episodes: As given; kept up to date.
    """

    def __init__(self, episodes: IntArray, taken: Sequence[np.ndarray]) -> None:
        self.episodes = episodes
        self._steps = np.array([len(x) for x in taken], np.int64)
        longest = max(_FIRST_LENGTH, int(self._steps.max()))
        self._taken = np.zeros((longest, len(taken)), np.int16)
        for env, actions in enumerate(taken):
            self._taken[: len(actions), env] = actions

    @classmethod
    def at_the_beginning(cls, num_envs: int) -> Places:
        """Before the first decision of the first episodes."""
        return cls(np.zeros(num_envs, np.int64), [np.empty(0, np.int16)] * num_envs)

    def taken(self) -> list[np.ndarray]:
        """Return what was done in the episodes that are being played, `int16[steps]` each."""
        return [self._taken[:n, env].copy() for env, n in enumerate(self._steps.tolist())]

    def note(self, actions: IntArray, ended: BoolArray) -> None:
        """Note a step of all environments; where an episode has ended, the next one has begun."""
        if self._steps.max() == len(self._taken):
            self._taken = np.concatenate([self._taken, np.zeros_like(self._taken)])
        self._taken[self._steps, np.arange(len(actions))] = actions
        self._steps = np.where(ended, 0, self._steps + 1)
        self.episodes = self.episodes + ended

    def go_to(self, batch: Batch) -> None:
        """Bring environments that were seeded as in the run to these places.

        Args:
            batch: At the beginning of its sequences of episodes.
        """
        batch.skip_to(self.episodes)
        batch.reset(np.arange(batch.num_envs))
        for step in range(int(self._steps.max())):
            active = step < self._steps
            batch.step(np.where(active, self._taken[step], 0), active)
