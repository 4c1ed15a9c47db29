"""Settings of a run that trains an order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Fixed, Suppress, arg

from servegym.errors import ConfigError


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
        if not 0 < self.load[0] <= self.load[1]:
            raise ConfigError(f"load must go from low to high, above 0, got {self.load}")
        if not self.max_minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.max_minutes:g}")
        for name in ("max_generations", "num_candidates", "num_episodes", "num_validation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
