"""Cross-entropy search: a distribution over a policy's weights, narrowed around the best of them.

Without gradients, for policies of some numbers whose episodes are played in compiled code. All
candidates of a generation play the same episodes, so what arrivals do cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from servegym.errors import ConfigError
from servegym.typing import FloatArray


@dataclass
class Search:
    """A normal distribution over the weights, narrowed around the best of each generation.

    Attributes:
        mean: Its means, `float64[weights]`.
        spread: Its standard deviations, same shape.
        generation: How many there have been.
    """

    mean: FloatArray
    spread: FloatArray
    generation: int = 0

    def state(self) -> list[Any]:
        """Return what a checkpoint holds of it."""
        return [torch.from_numpy(self.mean), torch.from_numpy(self.spread), self.generation]

    @classmethod
    def of(cls, state: list[Any]) -> Search:
        """Make it again from `state`."""
        mean, spread, generation = state
        return cls(mean.numpy(), spread.numpy(), int(generation))

    def step(
        self,
        loss: Callable[[FloatArray], float],
        rng: np.random.Generator,
        *,
        size: int = 24,
        elite: int = 6,
    ) -> float:
        """Try one generation.

        Args:
            loss: Of weights, lower is better; the same episodes for all of a generation.
            rng: Randomness.
            size: Candidates; the mean is one of them.
            elite: Best ones that make the next distribution.

        Returns:
            Mean loss of the best.
        """
        if not 1 <= elite <= size:
            raise ConfigError(f"elite must be within 1..{size}, got {elite}")
        tried = self.draw(rng, size)
        return self.update(tried, np.array([loss(theta) for theta in tried]), elite)

    def draw(self, rng: np.random.Generator, size: int) -> FloatArray:
        """Draw the candidates of a generation, the mean first, `float64[size, weights]`."""
        tried: FloatArray = self.mean + self.spread * rng.normal(size=(size, len(self.mean)))
        tried[0] = self.mean
        return tried

    def update(self, tried: FloatArray, found: FloatArray, elite: int) -> float:
        """Narrow the distribution around the best.

        Args:
            tried: Candidates, `float64[size, weights]`.
            found: Their losses, `float64[size]`.
            elite: Best ones that make the next distribution.

        Returns:
            Mean loss of the best.
        """
        best = np.argsort(found)[:elite]
        share = np.log(elite + 0.5) - np.log(np.arange(1, elite + 1))
        share /= share.sum()
        around = np.sqrt(share @ (tried[best] - self.mean) ** 2)
        self.mean = 0.4 * self.mean + 0.6 * (share @ tried[best])
        self.spread = np.maximum(0.7 * self.spread + 0.3 * around, 0.02)
        self.generation += 1
        return float(found[best].mean())
