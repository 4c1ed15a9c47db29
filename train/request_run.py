"""What all runs have in common that play whole episodes of requests, in compiled code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from typing_extensions import override

from servegym.cluster.outcome import latencies
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.scenario import Scenario, load_scenario
from servegym.train.run_folder import StoredRun
from servegym.train.training_run import Found, TrainingRun
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray


class RequestSettings(Protocol):
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
    def num_episodes(self) -> int:
        """That are played together."""
        ...

    @property
    def seed(self) -> int:
        """Of everything."""
        ...


C = TypeVar("C", bound=RequestSettings)


class RequestRun(TrainingRun[C, Scenario, Found]):
    """A run that plays whole episodes of requests."""

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
        """Draw the first seed of episodes to train on."""
        return int(self._rng.integers(1, FIRST_SEED - self.config.num_episodes))

    def validated_by(self, simulator: Simulator) -> Validated:
        """Sum up what a simulator has played of the validation episodes."""
        ends = [simulator.outcomes(env) for env in range(len(self._validation))]
        return Validated.of(
            losses(self.scenario, simulator),
            [x["finish_s"] - x["arrival_s"] for x in ends],
            in_time=self.scenario.objective == "goodput",
        )

    def warm_up(self) -> None:
        """Compile, where no validation has done so yet, and see how long one takes."""
        if self.validate_s == 0.0:
            self._validated()


def losses(scenario: Scenario, simulator: Simulator) -> FloatArray:
    """Return the loss of each episode that a simulator has played.

    The logarithm of the mean E2E latency or, under `tail`, of the 99th percentile of TTFT, seconds;
    or minus the share in time.
    """
    env = simulator.state.env
    if scenario.objective == "goodput":
        good: FloatArray = -env["good"] / env["num_requests"]
        return good
    if scenario.objective == "tail":
        firsts = [latencies(simulator.outcomes(e))[0] for e in range(len(env))]
        return np.log([np.nanpercentile(ttft_s, 99) for ttft_s in firsts])
    return np.log(env["area"] / env["num_requests"])
