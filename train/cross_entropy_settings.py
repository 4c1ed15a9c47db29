"""Settings of a run that searches a dispatcher's weights on whole episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, Suppress, arg

from servegym.baselines.registry import policy
from servegym.errors import ConfigError
from servegym.policy.costs import HELD_BASES
from servegym.policy.perceptron_rule import BASES, SEARCHED, Base
from servegym.train.ranges import check_counts, check_load, check_minutes


@dataclass(frozen=True)
class CrossEntropyTraining:
    """Settings of a run."""

    scenario: Annotated[str, Fixed, Suppress] = "mixed-chat"
    """Bundled name or YAML file."""
    learner: Annotated[Literal["cross-entropy"], Fixed, Suppress] = "cross-entropy"
    """What `--learner` calls it."""
    load: tuple[float, float] = (0.7, 1.1)
    """Range of the load factor; the episodes of a generation are spread over it."""
    max_minutes: Annotated[float, arg(name="minutes")] = 10.0
    """Wall-clock time, shared by both stages, from when all is compiled."""
    max_generations: int = 1_000_000
    """Generations of both stages, at most."""
    base: str = "prefix-load"
    """Rule where the search begins, with its parameters: prefix-load, good where the tail counts,
    added-delay, added-delay-inferred, whose shrink and observed stay as they are, or
    added-delay-held, with which whom to hold is searched, too; its shrink and most stay."""
    eta: float = 10.0
    """Weight of the rule's cost beside the score at first, per second: less where requests take
    long, else the score weighs nothing beside it."""
    extended: bool = False
    """Let the score see what a router infers, too: step times, expected lengths, and whom a choice
    pushes over its limits."""
    spread: float = 0.3
    """Standard deviation of the first candidates' weights, in those of the inputs."""
    holds_only: bool = False
    """Search whom to hold, and the rule's numbers, before hidden units; with a base that holds."""
    num_hidden: int = 6
    """Hidden units beside the linear score; 0 stops with that."""
    num_candidates: int = 24
    """Of a generation."""
    num_episodes: int = 4
    """That each of them plays."""
    num_requests: int = 1500
    """Requests of each."""
    num_validation: int = 8
    """Episodes by which the best is chosen."""
    validation_requests: int = 3000
    """Requests of each of those."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        rule, searched = policy(self.base), SEARCHED[base_of(self.base)]
        if not all(rule.params[i] > 0 for i in searched):
            names = ", ".join(rule.param_names[i] for i in searched)
            raise ConfigError(
                f"{names} of base must be above 0, got {self.base!r}: their logarithms are "
                "searched, so give a small number in place of nothing"
            )
        for name in ("eta", "spread"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name):g}")
        if self.holds_only and base_of(self.base) not in HELD_BASES:
            raise ConfigError(
                f"holds_only is for a base that holds, {', '.join(HELD_BASES)}, got {self.base!r}"
            )
        check_load(self.load)
        check_minutes(self.max_minutes)
        if self.num_hidden < 0:
            raise ConfigError(f"num_hidden must be at least 0, got {self.num_hidden}")
        check_counts(
            self,
            "max_generations",
            "num_candidates",
            "num_episodes",
            "num_requests",
            "num_validation",
            "validation_requests",
        )


def base_of(text: str) -> Base:
    """Return which rule a search begins as.

    Args:
        text: The rule, with its parameters if it has any.

    Raises:
        ConfigError: If there is none that can be corrected.
    """
    name = policy(text).name.partition(":")[0]
    for base in BASES:
        if name == base:
            return base
    raise ConfigError(f"base must be one of {', '.join(BASES)}, got {text!r}")
