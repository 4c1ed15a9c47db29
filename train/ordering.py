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
from servegym.policy.ordering import (
    COMPUTED_TOKENS,
    NUM_ORDERING_FEATURES,
    NUM_RUNNING,
    PREDICTED_REMAINING_TOKENS,
    OrderingPolicy,
)
from servegym.policy.play_perceptron import Perceptrons, play_perceptrons
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import Scenario, load_scenario
from servegym.train.ordering_settings import OrderingTraining
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.training_run import Stage, TrainingRun
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray

#: The request's own features; the engine's are the same in all rows and change no linear order.
_OWN = range(COMPUTED_TOKENS, NUM_RUNNING)
#: Share of the run for the search of a linear score, where hidden units follow.
_LINEAR_SHARE = 0.4
#: Rows that say how features are distributed.
_NUM_SAMPLES = 20_000


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


def losses(scenario: Scenario, state_env: np.ndarray) -> FloatArray:
    """Return each episode's loss: log of the mean E2E seconds, or minus the share in time."""
    if scenario.objective == "goodput":
        good: FloatArray = -state_env["good"] / state_env["num_requests"]
        return good
    return np.log(state_env["area"] / state_env["num_requests"])


class _Sampler:
    """An order that keeps some of the rows it sees."""

    memory_size = 0

    def __init__(self, inner: OrderingPolicy, rng: np.random.Generator) -> None:
        self._inner, self._rng = inner, rng
        self.name, self.information = inner.name, inner.information
        self.rows: list[FloatArray] = []

    def score(self, features: FloatArray, memory: FloatArray) -> FloatArray:
        """See `OrderingPolicy.score`."""
        self.rows.append(features[self._rng.random(len(features)) < 0.05])
        return self._inner.score(features, memory)


class OrderingTrainer(TrainingRun[OrderingTraining, Scenario, Trained]):
    """A run that searches an order."""

    problem = "order"
    settings = OrderingTraining
    stages = (Stage("linear", "generations"), Stage("hidden", "generations"))
    references = ("srpt", "footprint", "edf")
    validate_every = 5
    save_every = 1
    load_scenario = staticmethod(load_scenario)

    def __init__(self, config: OrderingTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self._rng = np.random.default_rng(config.seed)
        self._validation = self._episodes(FIRST_SEED, config.num_validation)
        self.samples = self._sample()
        logs = np.copysign(np.log1p(np.abs(self.samples)), self.samples)
        self._mean = logs.mean(0)
        spread = logs.std(0)
        # of a feature that never differs in training nothing is learned: it is given no weight
        self._varies = spread > 1e-6
        self._scale = np.where(self._varies, spread, 1.0)
        self._linear = [k for k in _OWN if self._varies[k]]
        guess = self._first_guess()
        self.search = Search(guess, np.full(len(guess), 0.3))

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> Scenario:
        return Scenario.model_validate(contents)

    @staticmethod
    def completed(config: OrderingTraining, scenario: Scenario) -> OrderingTraining:
        """Refuse scenarios in which nothing is ordered."""
        if not scenario.orders_requests:
            raise ConfigError(
                f"scenario {scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority to train an order on it"
            )
        return config

    def _episodes(self, first_seed: int, count: int) -> list[Episode]:
        """Draw episodes over the range of loads, evenly, in the order of their seeds."""
        low, high = self.config.load
        return [
            self.scenario.episode(
                first_seed + i,
                load=low + (high - low) * ((i * 0.6180339887) % 1.0),
                num_requests=self.config.num_requests,
            )
            for i in range(count)
        ]

    def _sample(self) -> FloatArray:
        sampler = _Sampler(ordering_policy("srpt"), self._rng)
        episodes = self._validation[:4]
        run_ordering(make_simulator(self.scenario.spec, episodes, sampler), sampler)
        rows = np.concatenate(sampler.rows)
        if not len(rows):
            raise ConfigError(
                f"nobody ever waits for another in {self.scenario.name} at load "
                f"{self.config.load}: raise load"
            )
        return rows[self._rng.permutation(len(rows))[:_NUM_SAMPLES]]

    def perceptrons(self, thetas: FloatArray) -> Perceptrons:
        """Build perceptrons from flat weights, `float64[C, size]`: linear part, hidden part.

        A linear score passes two hidden units, one for each sign.
        """
        count, own = len(thetas), len(self._linear)
        linear, free = np.split(thetas, [2 * own], axis=1)
        extra = free.shape[1] // (NUM_ORDERING_FEATURES + 3)
        hidden = np.zeros((count, NUM_ORDERING_FEATURES, 4 + extra))
        bias = np.zeros((count, 4 + extra))
        out = np.zeros((count, 4 + extra, 2))
        for head in range(2):
            direction = linear[:, head * own : (head + 1) * own]
            hidden[:, self._linear, 2 * head] = direction
            hidden[:, self._linear, 2 * head + 1] = -direction
            out[:, 2 * head, head] = 1.0
            out[:, 2 * head + 1, head] = -1.0
        parts = free.reshape(count, extra, NUM_ORDERING_FEATURES + 3)
        inputs = parts[:, :, :NUM_ORDERING_FEATURES] * self._varies
        hidden[:, :, 4:] = inputs.transpose(0, 2, 1)
        bias[:, 4:] = parts[:, :, NUM_ORDERING_FEATURES]
        out[:, 4:] = parts[:, :, NUM_ORDERING_FEATURES + 1 :]
        return Perceptrons(self._mean, self._scale, hidden, bias, out)

    def _play(self, thetas: FloatArray, episodes: list[Episode]) -> Simulator:
        """Play the same episodes under each of some weights."""
        nets, threads = self.perceptrons(thetas), self.config.num_threads
        return play_perceptrons(self.scenario.spec, episodes, nets, threads)

    def loss(self, thetas: FloatArray, episodes: list[Episode]) -> FloatArray:
        """Return the mean loss of each of some weights on the same episodes, `float64[C]`."""
        found: FloatArray = losses(self.scenario, self._play(thetas, episodes).state.env)
        return found.reshape(len(thetas), len(episodes)).mean(1)

    def validate(self) -> Validated:
        """Play the validation episodes under the mean of the search."""
        return self._validated_by(self._play(self.search.mean[None], self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        policy = ordering_policy(name)
        simulator = make_simulator(self.scenario.spec, self._validation, policy)
        run_ordering(simulator, policy)
        return self._validated_by(simulator)

    def _validated_by(self, simulator: Simulator) -> Validated:
        ends = [simulator.outcomes(env) for env in range(len(self._validation))]
        return Validated.of(
            losses(self.scenario, simulator.state.env),
            [x["finish_s"] - x["arrival_s"] for x in ends],
            in_time=self.scenario.objective == "goodput",
        )

    def _first_guess(self) -> FloatArray:
        """Shortest remaining first, for both heads."""
        theta = np.zeros((2, len(self._linear)))
        theta[:, self._linear.index(PREDICTED_REMAINING_TOKENS)] = 1.0
        return theta.ravel()

    @property
    def generation(self) -> int:
        """Generations of both searches up to now."""
        return self.num_updates_made

    @override
    def share_of_updates(self) -> float:
        return self.generation / self.config.max_generations

    def goes_on(self) -> bool:
        """Whether this search has had its share, or would exceed it with another generation."""
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

    def open_stage(self) -> None:
        """Put hidden units beside the linear score."""
        if self.stage == 0:
            return
        free = np.zeros((self.config.num_hidden, NUM_ORDERING_FEATURES + 3))
        free[:, : NUM_ORDERING_FEATURES + 1] = self._rng.normal(
            0.0, 0.3, (self.config.num_hidden, NUM_ORDERING_FEATURES + 1)
        )
        # their outputs are 0 at first, so the order is still the linear one
        self.best = torch.from_numpy(np.concatenate([self.best.numpy(), free.ravel()]))
        self.search = Search(self.best.numpy().copy(), np.full(len(self.best), 0.1))

    def improve(self) -> dict[str, float]:
        """Narrow the distribution once."""
        config, search = self.config, self.search
        first_seed = int(self._rng.integers(1, FIRST_SEED - config.num_episodes))
        episodes = self._episodes(first_seed, config.num_episodes)
        tried = search.draw(self._rng, config.num_candidates)
        found = search.update(tried, self.loss(tried, episodes), config.num_candidates // 4)
        return {"rollout/return": -found, "train/spread": float(search.spread.mean())}

    @override
    def parameters(self) -> Tensor:
        return torch.from_numpy(self.search.mean.copy())

    @override
    def take_best(self) -> None:
        self.perceptrons(self.best.numpy()[None])  # of the right size

    @override
    def found(self) -> Trained:
        nets = self.perceptrons(self.best.numpy()[None])
        weights = OrderingWeights(
            mean=nets.mean.astype(np.float32),
            scale=nets.scale.astype(np.float32),
            weights=(nets.hidden[0].astype(np.float32), nets.out[0].astype(np.float32)),
            biases=(nets.hidden_bias[0].astype(np.float32), np.zeros(2, np.float32)),
        )
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
