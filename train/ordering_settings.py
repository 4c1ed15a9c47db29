"""Settings of a run that trains an order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Fixed, Suppress, arg

from servegym.train.ranges import check_counts, check_load, check_minutes


@dataclass(frozen=True)
class OrderingTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "kv-starved"
    """Bundled name or YAML file, of one engine that goes by priorities."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    max_minutes: Annotated[float, arg(name="minutes")] = 10.0
    """Wall-clock time, shared by both searches, from when all is compiled."""
    max_generations: int = 1_000_000
    """Generations of both, at most."""
    num_hidden: int = 8
    """Hidden units beside the linear score; 0 stops with that."""
    num_candidates: int = 48
    """Of a generation."""
    num_episodes: int = 12
    """That each of them plays."""
    num_validation: int = 32
    """Episodes by which the best is chosen."""
    num_requests: int | None = None
    """Requests per episode, else the scenario's own."""
    num_threads: int = 2
    """Threads that share the work."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        check_load(self.load)
        check_minutes(self.max_minutes)
        check_counts(self, "max_generations", "num_candidates", "num_episodes", "num_validation")
