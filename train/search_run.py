"""What all runs have in common that search weights of policies.

First the weights of linear scores, then those of hidden units beside them. All candidates of a
generation play the same episodes, so what arrivals do cancels. What is kept is what is best on
validation episodes.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, TypeVar

from typing_extensions import override

from servegym.train.request_run import RequestRun, RequestSettings
from servegym.train.training_run import Found, Stage

#: Share of the run for the search of linear scores, where hidden units follow.
_LINEAR_SHARE = 0.4


class SearchSettings(RequestSettings, Protocol):
    """What the settings of all of them have."""

    @property
    def max_generations(self) -> int:
        """Generations of both stages, at most."""
        ...

    @property
    def num_hidden(self) -> int:
        """Hidden units beside a linear score; 0 stops with that."""
        ...


C = TypeVar("C", bound=SearchSettings)


class SearchRun(RequestRun[C, Found]):
    """A run that searches weights on whole episodes of requests."""

    stages: ClassVar[tuple[Stage, ...]] = (
        Stage("linear", "generations"),
        Stage("hidden", "generations"),
    )

    @property
    def generation(self) -> int:
        """Generations of both stages up to now."""
        return self.num_updates_made

    @override
    def share_of_updates(self) -> float:
        return self.generation / self.config.max_generations

    def goes_on(self) -> bool:
        """Whether this stage has had its share, or would exceed it with another generation."""
        if self.generation == 0:
            return True
        if self.stage == 1 and self.config.num_hidden == 0:
            return False
        last = self.config.num_hidden == 0 or self.stage == 1
        share = 1.0 if last else _LINEAR_SHARE
        has_time = self.budget.fits(self.update_s + self.validate_s, share)
        return self.share_of_updates() < share and has_time
