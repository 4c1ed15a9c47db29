"""Settings of a run that searches for both decisions of a fleet in which KV moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress, arg

from servegym.errors import ConfigError
from servegym.train.ranges import check_counts, check_load, check_minutes


@dataclass(frozen=True)
class FleetSearchTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "pd-unequal"
    """Bundled name or YAML file, with replicas that only prefill or decode, requests that
    migrate, or tiers of KV."""
    learner: Annotated[Literal["search"], Fixed, Suppress] = "search"
    """What `--learner` calls it."""
    start: str = ""
    """Rules from which the search begins, with their parameters: DISPATCH+freeness or
    DISPATCH+freeness-waiting where requests migrate; DISPATCH+RETENTION where there are tiers, the
    second one lru, ttl, lognormal or offload-within."""
    load: tuple[float, float] = (0.8, 1.3)
    """Range of the load factor, over which episodes are spread."""
    max_minutes: Annotated[float, arg(name="minutes")] = 15.0
    """Wall-clock time, from when all is compiled."""
    max_generations: int = 1_000_000
    """Generations, at most."""
    num_candidates: int = 24
    """Of a generation."""
    num_episodes: int = 6
    """That each of them plays."""
    num_requests: int = 1024
    """Requests of each of those."""
    num_validation: int = 32
    """Episodes by which the best is chosen."""
    validation_requests: int | None = None
    """Requests of each of those; as many as the scenario's episodes have, where nothing is said."""
    margin: float = 2.0
    """Standard errors by which a policy must be ahead of the start on those, or the start is kept;
    with 0 any gain will do."""
    seed: int = 0
    """Of everything."""

    @property
    def num_hidden(self) -> int:
        """None: scores are linear in their terms."""
        return 0

    def __post_init__(self) -> None:
        check_load(self.load)
        check_minutes(self.max_minutes)
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"margin must be at least 0 and finite, got {self.margin:g}")
        counts = ["max_generations", "num_candidates", "num_episodes", "num_requests"]
        if self.validation_requests is not None:
            counts.append("validation_requests")
        check_counts(self, *counts)
        if self.num_validation < 2:
            raise ConfigError(
                "num_validation must be at least 2, as one episode does not say how far off it is, "
                f"got {self.num_validation}"
            )
