"""What all runs have in common that search weights of policies on whole episodes.

First the weights of linear scores, then those of hidden units beside them. All candidates of a
generation play the same episodes, in compiled code, so what arrivals do cancels. What is kept is
what is best on validation episodes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from typing_extensions import override

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.scenario import Scenario, load_scenario
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Found, Stage, TrainingRun
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray

#: Share of the run for the search of linear scores, where hidden units follow.
_LINEAR_SHARE = 0.4


class SearchSettings(Protocol):
    """What the settings of all of them have."""

    @property
    def scenario(self) -> str:
        """Name or path of what is played."""
        ...

    @property
    def load(self) -> tuple[float, float]:
        """Range of the load factor, drawn per episode."""
        ...

    @property
    def max_minutes(self) -> float:
        """Wall-clock minutes after which training ends."""
        ...

    @property
    def max_generations(self) -> int:
        """Generations of both stages, at most."""
        ...

    @property
    def num_hidden(self) -> int:
        """Hidden units beside a linear score; 0 stops with that."""
        ...

    @property
    def num_episodes(self) -> int:
        """That each candidate plays."""
        ...

    @property
    def seed(self) -> int:
        """Of everything."""
        ...


C = TypeVar("C", bound=SearchSettings)


class SearchRun(TrainingRun[C, Scenario, Found]):
    """A run that searches weights on whole episodes of requests."""

    stages = (Stage("linear", "generations"), Stage("hidden", "generations"))
    validate_every = 5
    save_every = 1
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: C, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self._rng = np.random.default_rng(config.seed)
        self._validation = self._validation_episodes()

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> Scenario:
        return Scenario.model_validate(contents)

    @abstractmethod
    def _validation_episodes(self) -> list[Episode]:
        """Draw those by which the best is chosen."""

    def episodes(self, first_seed: int, count: int, num_requests: int | None) -> list[Episode]:
        """Draw episodes over the range of loads, evenly, in the order of their seeds."""
        low, high = self.config.load
        return [
            self.scenario.episode(
                first_seed + i,
                load=low + (high - low) * ((i * 0.6180339887) % 1.0),
                num_requests=num_requests,
            )
            for i in range(count)
        ]

    def draw_first_seed(self) -> int:
        """Draw the first seed of a generation's episodes."""
        return int(self._rng.integers(1, FIRST_SEED - self.config.num_episodes))

    def validated_by(self, simulator: Simulator) -> Validated:
        """Sum up what a simulator has played of the validation episodes."""
        ends = [simulator.outcomes(env) for env in range(len(self._validation))]
        return Validated.of(
            losses(self.scenario, simulator.state.env),
            [x["finish_s"] - x["arrival_s"] for x in ends],
            in_time=self.scenario.objective == "goodput",
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

    def warm_up(self) -> None:
        """Compile, where no validation has done so yet, and see how long one takes."""
        if self.validate_s == 0.0:
            self._validated()


def losses(scenario: Scenario, state_env: np.ndarray) -> FloatArray:
    """Return each episode's loss: log of the mean E2E seconds, or minus the share in time."""
    if scenario.objective == "goodput":
        good: FloatArray = -state_env["good"] / state_env["num_requests"]
        return good
    return np.log(state_env["area"] / state_env["num_requests"])
