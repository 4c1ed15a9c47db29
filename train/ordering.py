"""Training an order inside an engine: a search over the weights of a perceptron.

First a score that is linear in the logarithms of a request's features, some twenty numbers: it can
be any product of powers, of which shortest remaining first is one. Then hidden units beside it. All
candidates of a generation play the same episodes, in compiled code, so what arrivals do cancels.
What is kept is what is best on validation episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from servegym.train.ordering_settings import OrderingTraining
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun, losses
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray


@dataclass
class Trained:
    """What a run found.

    Attributes:
        weights: The perceptron.
        loss: Its mean loss on the validation episodes, see `losses`.
        base_loss: That of `srpt`, where the search begins.
        generations: Of both searches.
        spent_s: Wall-clock time of both.
        samples: Rows of features, `float64[n, NUM_ORDERING_FEATURES]`.
    """

    weights: OrderingWeights
    loss: float
    base_loss: float
    generations: int
    spent_s: float
    samples: FloatArray


class OrderingTrainer(SearchRun[OrderingTraining, Trained]):
    """A run that searches an order."""

    problem = "order"
    settings = OrderingTraining
    references = ("srpt", "footprint", "edf")

    def __init__(self, config: OrderingTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self.samples = self._sample()
        self.space = OrderSpace(self.samples)
        guess = self._first_guess()
        self.search = Search(guess, np.full(len(guess), 0.3))

    @staticmethod
    def completed(config: OrderingTraining, scenario: Scenario) -> OrderingTraining:
        """Refuse scenarios in which nothing is ordered."""
        if not scenario.orders_requests:
            raise ConfigError(
                f"scenario {scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority to train an order on it"
            )
        return config

    @override
    def _validation_episodes(self) -> list[Episode]:
        return self.episodes(FIRST_SEED, self.config.num_validation, self.config.num_requests)

    def _sample(self) -> FloatArray:
        sampler = Sampler(ordering_policy("srpt"), self._rng)
        episodes = self._validation[:4]
        run_ordering(make_simulator(self.scenario.spec, episodes, sampler), sampler)
        return sampler.samples(f"{self.scenario.name} at load {self.config.load}")

    def _play(self, thetas: FloatArray, episodes: list[Episode]) -> Simulator:
        """Play the same episodes under each of some weights."""
        nets, threads = self.space.perceptrons(thetas), self.config.num_threads
        return play_perceptrons(self.scenario.spec, episodes, nets, threads)

    def loss(self, thetas: FloatArray, episodes: list[Episode]) -> FloatArray:
        """Return the mean loss of each of some weights on the same episodes, `float64[C]`."""
        found: FloatArray = losses(self.scenario, self._play(thetas, episodes).state.env)
        return found.reshape(len(thetas), len(episodes)).mean(1)

    def validate(self) -> Validated:
        """Play the validation episodes under the mean of the search."""
        return self.validated_by(self._play(self.search.mean[None], self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        policy = ordering_policy(name)
        simulator = make_simulator(self.scenario.spec, self._validation, policy)
        run_ordering(simulator, policy)
        return self.validated_by(simulator)

    def _first_guess(self) -> FloatArray:
        """Shortest remaining first, for both heads."""
        return self.space.guess({PREDICTED_REMAINING_TOKENS: 1.0})

    def open_stage(self) -> None:
        """Put hidden units beside the linear score."""
        if self.stage == 0:
            return
        start = self.space.with_units(self.best.numpy(), self.config.num_hidden, self._rng)
        self.best = torch.from_numpy(start)
        self.search = Search(start.copy(), np.full(len(start), 0.1))

    def improve(self) -> dict[str, float]:
        """Narrow the distribution once."""
        config, search = self.config, self.search
        first_seed = self.draw_first_seed()
        episodes = self.episodes(first_seed, config.num_episodes, config.num_requests)
        tried = search.draw(self._rng, config.num_candidates)
        found = search.update(tried, self.loss(tried, episodes), config.num_candidates // 4)
        return {"rollout/return": -found, "train/spread": float(search.spread.mean())}

    @override
    def parameters(self) -> Tensor:
        return torch.from_numpy(self.search.mean.copy())

    @override
    def take_best(self) -> None:
        self.space.perceptrons(self.best.numpy()[None])  # of the right size

    @override
    def found(self) -> Trained:
        weights = self.space.weights(self.best.numpy())
        loss, first = float(self.best_scores.mean()), float(self.first_scores.mean())
        return Trained(weights, loss, first, self.generation, self.spent_s, self.samples)

    def export(self, folder: Path | None = None) -> Path:
        """Write a file for the plug-in of the engine."""
        found = self.found()
        return save_ordering(
            found.weights,
            folder or self.folder.path,
            found.samples,
            scenario=self.config.scenario,
            training={
                "algorithm": "cross-entropy search",
                "generations": found.generations,
                "minutes": round(found.spent_s / 60.0, 2),
                "seed": self.config.seed,
                "validation_loss": round(found.loss, 5),
                "validation_loss_srpt": round(found.base_loss, 5),
            },
        )

    @override
    def state(self) -> dict[str, Any]:
        return {"search": self.search.state(), "rng": json.dumps(self._rng.bit_generator.state)}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.search = Search.of(content["search"])
        self._rng.bit_generator.state = json.loads(content["rng"])
        self.take_best()
