"""Settings of a run that evolves a closed-form score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress, arg

from servegym.errors import ConfigError
from servegym.policy.expression import MAX_SIZE
from servegym.train.ranges import check_counts, check_load, check_minutes


@dataclass(frozen=True)
class EvolveTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "mixed-chat"
    """Bundled scenario name or YAML file."""
    learner: Annotated[Literal["evolve"], Fixed, Suppress] = "evolve"
    """What `--learner` calls it."""
    load: tuple[float, float] = (0.7, 1.1)
    """Range of the load factor, over which episodes are spread."""
    max_minutes: Annotated[float, arg(name="minutes")] = 15.0
    """Wall-clock time, from when all is compiled."""
    max_generations: int = 1_000_000
    """Generations, at most."""
    starts: tuple[str, ...] = ()
    """Scores to begin with besides the rules'; texts as docs/policies.md says."""
    num_candidates: int = 48
    """Of a generation; half of them are children."""
    max_parts: int = 80
    """Numbers, features, operators and functions of a score, at most."""
    price: float = 5e-5
    """On each of them, in relative latency: what a part must bring to stay."""
    num_episodes: int = 4
    """That each candidate plays in a generation."""
    num_validation: int = 16
    """Episodes by which the best is chosen."""
    num_requests: int = 1024
    """Requests per episode of training; those of validation have four times as many."""
    seed: int = 0
    """Of everything."""

    @property
    def num_hidden(self) -> int:
        """None: a score has no hidden units."""
        return 0

    def __post_init__(self) -> None:
        check_load(self.load)
        check_minutes(self.max_minutes)
        if not self.price >= 0:
            raise ConfigError(f"price must be at least 0, got {self.price:g}")
        if not 1 <= self.max_parts <= MAX_SIZE:
            raise ConfigError(f"max_parts must be from 1 to {MAX_SIZE}, got {self.max_parts}")
        if self.num_candidates < 4:
            raise ConfigError(f"num_candidates must be at least 4, got {self.num_candidates}")
        check_counts(self, "max_generations", "num_episodes", "num_validation", "num_requests")
