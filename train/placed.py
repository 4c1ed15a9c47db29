"""Training both decisions of a fleet in which requests are placed: a search over two scores.

What a choice does to a request that is prefilled here and decodes there shows only when it has been
through both, so choices are not tried one by one: whole episodes are played, in compiled code, all
candidates of a generation the same ones. What is kept is what is best on validation episodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError
from servegym.export.placed import save_placed
from servegym.export.resolve import resolve_dispatch
from servegym.policy.placed import Placed
from servegym.policy.placed_scores import NUM_TERMS, TERMS, PlacedWeights, placed_policy
from servegym.policy.run_placed import make_simulator, run_placed
from servegym.scenario import Scenario
from servegym.train.placed_settings import PlacedTraining
from servegym.train.request_run import losses
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun
from servegym.train.training_run import Stage
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray

#: Where the search begins: what is late or slow is bad, a little of either is a little bad.
_DISPATCH = {"log_ttft": 0.5, "late": 4.0, "log_tpot": 0.5, "slow": 4.0, "delays": 0.5}
_PLACE = {"late": 2.0, "log_tpot": 0.5, "slow": 4.0, "kv_usage": 1.0}
_REJECTION, _SPREAD = 0.3, 0.6


def first_guess() -> PlacedWeights:
    """Return the weights with which the search begins."""
    dispatch, place = np.zeros(NUM_TERMS + 1), np.zeros(NUM_TERMS)
    for weights, given in ((dispatch, _DISPATCH), (place, _PLACE)):
        for name, value in given.items():
            weights[TERMS.index(name)] = value
    dispatch[NUM_TERMS] = _REJECTION
    return PlacedWeights(dispatch, place)


class PlacedTrainer(SearchRun[PlacedTraining, PlacedWeights]):
    """A run that searches weights for dispatches and placings."""

    problem = "dispatch"
    settings = PlacedTraining
    stages = (Stage("search", "generations"),)
    references = ("added-delay+least-tpot", "class-aware+least-tpot", "conductor+least-tpot")

    def __init__(self, config: PlacedTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        guess = np.concatenate(first_guess())
        self.search = Search(guess, np.full(len(guess), _SPREAD))

    @staticmethod
    @override
    def completed(config: PlacedTraining, scenario: Scenario) -> PlacedTraining:
        if not scenario.spec.disaggregated:
            raise ConfigError(
                f"scenario {scenario.name} must have replicas that only prefill or decode for "
                "--learner search, as pd-unequal has: take another learner"
            )
        return config

    @override
    def _validation_episodes(self) -> list[Episode]:
        return self.episodes(FIRST_SEED, self.config.num_validation, self.config.num_requests)

    def _play(self, policy: Placed, episodes: list[Episode]) -> Simulator:
        simulator = make_simulator(self.scenario.spec, episodes)
        run_placed(simulator, policy)
        return simulator

    def loss(self, theta: FloatArray, episodes: list[Episode]) -> float:
        """Return the mean loss of some weights on episodes."""
        played = self._play(placed_policy(_weights(theta), "candidate"), episodes)
        return float(losses(self.scenario, played.state.env).mean())

    @override
    def validate(self) -> Validated:
        policy = placed_policy(_weights(self.search.mean), "search")
        return self.validated_by(self._play(policy, self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        policy = resolve_dispatch(name)
        assert isinstance(policy, Placed)
        return self.validated_by(self._play(policy, self._validation))

    @override
    def improve(self) -> dict[str, float]:
        config = self.config
        first_seed = self.draw_first_seed()
        episodes = self.episodes(first_seed, config.num_episodes, config.num_requests)
        loss = self.search.step(
            lambda theta: self.loss(theta, episodes),
            self._rng,
            size=config.num_candidates,
            elite=max(1, config.num_candidates // 4),
        )
        return {"rollout/return": -loss, "train/spread": float(self.search.spread.mean())}

    @override
    def parameters(self) -> Tensor:
        return torch.from_numpy(self.search.mean.copy())

    @override
    def take_best(self) -> None:
        self.search.mean = _checked(self.best.numpy()).copy()

    @override
    def found(self) -> PlacedWeights:
        return _weights(self.best.numpy())

    @override
    def export(self, folder: Path | None = None) -> Path:
        """Write both sets of weights as one policy."""
        return save_placed(
            self.found(),
            folder or self.folder.path / "policy",
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training={
                "algorithm": "cross-entropy search",
                "generations": self.generation,
                "minutes": round(self.spent_s / 60.0, 2),
                "seed": self.config.seed,
                "validation_loss": round(float(self.best_scores.mean()), 5),
            },
        )

    @override
    def state(self) -> dict[str, Any]:
        return {"search": self.search.state(), "rng": json.dumps(self._rng.bit_generator.state)}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        _checked(self.best.numpy())
        self.search = Search.of(content["search"])
        self._rng.bit_generator.state = json.loads(content["rng"])


def _checked(theta: FloatArray) -> FloatArray:
    if theta.shape != (2 * NUM_TERMS + 1,):
        raise ValueError(f"{2 * NUM_TERMS + 1} weights expected, got {theta.shape}")
    return theta


def _weights(theta: FloatArray) -> PlacedWeights:
    return PlacedWeights(theta[: NUM_TERMS + 1].copy(), theta[NUM_TERMS + 1 :].copy())
