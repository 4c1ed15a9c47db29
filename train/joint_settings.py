"""Settings of a run that trains a fleet's dispatcher and the order in its engines together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress, arg

from servegym.train.ranges import check_counts, check_load, check_minutes


@dataclass(frozen=True)
class JointTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "kv-starved-fleet"
    """Bundled name or YAML file, of several engines that go by priorities."""
    learner: Annotated[Literal["joint"], Fixed, Suppress] = "joint"
    """What `--learner` calls it."""
    start: str = ""
    """Pair from which the search begins, DISPATCH+ORDER with their parameters: added-delay,
    least-outstanding or min-kv, with fcfs, footprint or srpt behind it; empty: the best of sixteen
    pairs near to rules. With a start scores have the terms of footprint, too."""
    load: tuple[float, float] = (0.8, 1.25)
    """Range of the load factor, drawn per episode."""
    max_minutes: Annotated[float, arg(name="minutes")] = 10.0
    """Wall-clock time, shared by both stages, from when all is compiled."""
    max_generations: int = 1_000_000
    """Generations of both stages, at most; the schedulers' and the dispatcher's take turns."""
    num_hidden: int = 4
    """Hidden units beside each linear score, the schedulers' and the dispatcher's; 0 stops with
    those."""
    num_candidates: int = 32
    """Of a generation."""
    num_episodes: int = 4
    """That each of them plays."""
    num_requests: int = 1536
    """Requests of each."""
    num_validation: int = 8
    """Episodes by which the best is chosen, as long as the scenario's own."""
    num_threads: int = 2
    """Threads that share the work."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        check_load(self.load)
        check_minutes(self.max_minutes)
        check_counts(
            self,
            "max_generations",
            "num_candidates",
            "num_episodes",
            "num_requests",
            "num_validation",
            "num_threads",
        )
