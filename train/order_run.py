"""What all runs have in common that train an order inside one engine."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from servegym.baselines.ordering.registry import ordering_policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError
from servegym.export.ordering import save_ordering
from servegym.policy.learned_ordering import OrderingWeights
from servegym.policy.ordering import PREDICTED_REMAINING_TOKENS
from servegym.policy.play_perceptron import play_perceptrons
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import Scenario
from servegym.train.order_space import OrderSpace, Sampler
from servegym.train.request_run import RequestRun, RequestSettings
from servegym.train.run_folder import StoredRun
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray


class OrderSettings(RequestSettings, Protocol):
    """What the settings of all of them have."""

    @property
    def num_requests(self) -> int | None:
        """Requests per episode, else the scenario's own."""
        ...

    @property
    def num_validation(self) -> int:
        """Episodes by which the best is chosen."""
        ...

    @property
    def num_threads(self) -> int:
        """Threads that share the work."""
        ...


C = TypeVar("C", bound=OrderSettings)


@dataclass
class Trained:
    """What a run found.

    Attributes:
        weights: The perceptron.
        loss: Its mean loss on the validation episodes, see `losses`.
        base_loss: That of `srpt`, where it begins.
        generations: Generations or updates, of all stages.
        spent_s: Wall-clock time of all of them.
        samples: Rows of features, `float64[n, NUM_ORDERING_FEATURES]`.
    """

    weights: OrderingWeights
    loss: float
    base_loss: float
    generations: int
    spent_s: float
    samples: FloatArray


class OrderRun(RequestRun[C, Trained]):
    """A run that trains an order: a perceptron as flat weights, see `OrderSpace`.

    Attributes:
        samples: Rows of features that normalise its inputs.
        space: From flat weights to perceptrons.
    """

    problem = "order"
    references = ("srpt", "footprint", "edf")

    def __init__(self, config: C, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self.samples = self._sample()
        self.space = OrderSpace(self.samples)

    @staticmethod
    def completed(config: C, scenario: Scenario) -> C:
        """Refuse scenarios in which nothing is ordered."""
        if not scenario.orders_requests:
            raise ConfigError(
                f"scenario {scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority to train an order on it"
            )
        return config

    @property
    @abstractmethod
    def present(self) -> FloatArray:
        """Weights of the present policy, `float64[size]`."""

    @property
    @abstractmethod
    def described(self) -> dict[str, float | int | str]:
        """How it was trained, for the manifest."""

    @override
    def _validation_episodes(self) -> list[Episode]:
        return self.episodes(FIRST_SEED, self.config.num_validation, self.config.num_requests)

    def _sample(self) -> FloatArray:
        sampler = Sampler(ordering_policy("srpt"), self._rng)
        episodes = self._validation[:4]
        run_ordering(make_simulator(self.scenario.spec, episodes, sampler), sampler)
        return sampler.samples(f"{self.scenario.name} at load {self.config.load}")

    def _first_guess(self) -> FloatArray:
        """Shortest remaining first, for both heads."""
        return self.space.guess({PREDICTED_REMAINING_TOKENS: 1.0})

    def _play(self, thetas: FloatArray, episodes: list[Episode]) -> Simulator:
        """Play the same episodes under each of some weights."""
        nets, threads = self.space.perceptrons(thetas), self.config.num_threads
        return play_perceptrons(self.scenario.spec, episodes, nets, threads)

    def validate(self) -> Validated:
        """Play the validation episodes under the present policy."""
        return self.validated_by(self._play(self.present[None], self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        policy = ordering_policy(name)
        simulator = make_simulator(self.scenario.spec, self._validation, policy)
        run_ordering(simulator, policy)
        return self.validated_by(simulator)

    @override
    def parameters(self) -> Tensor:
        return torch.from_numpy(self.present.copy())

    @override
    def take_best(self) -> None:
        self.space.perceptrons(self.best.numpy()[None])  # of the right size

    @override
    def found(self) -> Trained:
        weights = self.space.weights(self.best.numpy())
        loss, first = float(self.best_scores.mean()), float(self.first_scores.mean())
        return Trained(weights, loss, first, self.num_updates_made, self.spent_s, self.samples)

    def export(self, folder: Path | None = None) -> Path:
        """Write a file for the plug-in of the engine."""
        found = self.found()
        return save_ordering(
            found.weights,
            folder or self.folder.path,
            found.samples,
            scenario=self.config.scenario,
            training={
                **self.described,
                "minutes": round(found.spent_s / 60.0, 2),
                "seed": self.config.seed,
                "validation_loss": round(found.loss, 5),
                "validation_loss_srpt": round(found.base_loss, 5),
            },
        )
