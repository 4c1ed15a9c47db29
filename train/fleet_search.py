"""Training both decisions of a fleet in which KV moves: a search over whole episodes.

Who goes where, and beside it where a request decodes or which ones migrate. What a choice does
there shows only later and elsewhere, so choices are not tried one by one: whole episodes are
played, in compiled code, all candidates of a generation the same ones. What is kept is what is best
on validation episodes, if it is ahead of what the search began with by more than luck may be.
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
from servegym.export.fleet import FleetWeights, fleet_policy, save_fleet
from servegym.export.resolve import resolve_dispatch
from servegym.policy.pair import Pair
from servegym.policy.policy import Policy
from servegym.problems.dispatch import DispatchEpisodes
from servegym.scenario import Scenario
from servegym.train.fleet_search_settings import FleetSearchTraining
from servegym.train.fleet_spaces import fleet_space
from servegym.train.request_run import losses
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun
from servegym.train.training_run import Stage
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import FloatArray


class FleetSearchTrainer(SearchRun[FleetSearchTraining, FleetWeights]):
    """A run that searches a dispatcher and the second decision of its fleet."""

    problem = "dispatch"
    settings = FleetSearchTraining
    stages = (Stage("search", "generations"),)

    def __init__(self, config: FleetSearchTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        self.space = fleet_space(self.scenario, config.start)
        self.search = Search(self.space.start.copy(), self.space.spread.copy())

    @staticmethod
    @override
    def completed(config: FleetSearchTraining, scenario: Scenario) -> FleetSearchTraining:
        fleet_space(scenario, config.start)  # refuses what cannot be searched
        return config

    @property
    @override
    def references(self) -> tuple[str, ...]:
        return self.space.references

    @override
    def _validation_episodes(self) -> list[Episode]:
        c = self.config
        return self.episodes(FIRST_SEED, c.num_validation, c.validation_requests)

    @override
    def is_better(self, found: Validated) -> bool:
        gain = float((self.first_scores - found.scores).mean())
        return super().is_better(found) and gain > self.config.margin * self._error(found.scores)

    def _error(self, scores: FloatArray) -> float:
        """Return the standard error of the gain over the start, episode by episode."""
        gains = self.first_scores - scores
        return float(gains.std(ddof=1) / np.sqrt(len(gains)))

    def _play(self, policy: Policy | Pair, episodes: list[Episode]) -> Simulator:
        return DispatchEpisodes(self.scenario, episodes).run(policy)

    def loss(self, theta: FloatArray, episodes: list[Episode]) -> float:
        """Return the mean loss of some weights on episodes."""
        policy = fleet_policy(self.space.weights(theta), "candidate")
        return float(losses(self.scenario, self._play(policy, episodes)).mean())

    @override
    def validate(self) -> Validated:
        policy = fleet_policy(self.space.weights(self.search.mean), "search")
        return self.validated_by(self._play(policy, self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        return self.validated_by(self._play(resolve_dispatch(name), self._validation))

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
        self.search.mean = self._checked(self.best.numpy()).copy()

    @override
    def found(self) -> FleetWeights:
        return self.space.weights(self.best.numpy())

    @override
    def export(self, folder: Path | None = None) -> Path:
        """Write both sets of weights as one policy."""
        return save_fleet(
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
                "validation_gain": round(self.gain, 5),
                "validation_gain_error": round(self._error(self.best_scores), 5),
            },
        )

    @override
    def state(self) -> dict[str, Any]:
        return {"search": self.search.state(), "rng": json.dumps(self._rng.bit_generator.state)}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self._checked(self.best.numpy())
        self.search = Search.of(content["search"])
        self._rng.bit_generator.state = json.loads(content["rng"])

    def _checked(self, theta: FloatArray) -> FloatArray:
        if theta.shape != self.space.start.shape:
            raise ValueError(f"{len(self.space.start)} weights expected, got {theta.shape}")
        return theta
