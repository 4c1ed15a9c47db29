"""Evolving a closed-form score for dispatch: whole episodes, played in compiled code.

It begins with today's rules as scores. What is kept is what is best on validation episodes, which
are longer, as what is good in short ones need not be in long ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from servegym.baselines.registry import policy
from servegym.baselines.score import RULES_AS_SCORES, score_policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError
from servegym.export.score import sample_rows, save_score
from servegym.policy.expression import Expression, parse
from servegym.policy.policy import Policy
from servegym.policy.run import run
from servegym.scenario import Scenario
from servegym.train.evolution import Evolution, Proportions
from servegym.train.evolve_settings import EvolveTraining
from servegym.train.request_run import losses
from servegym.train.run_folder import StoredRun
from servegym.train.search_run import SearchRun
from servegym.train.training_run import Stage
from servegym.train.validation import FIRST_SEED, Validated

#: What losses are compared with, and where the search begins.
_REFERENCE = "added-delay"
#: How much longer validation episodes are.
_LONGER = 4
#: A candidate that is worse than the reference by so much in the first episode plays no other.
_HOPELESS = 0.1
#: Episodes whose observations state the ranges of features.
_NUM_SAMPLED = 8


class EvolveTrainer(SearchRun[EvolveTraining, Expression]):
    """A run that evolves a score; `found` is its expression."""

    problem = "dispatch"
    settings = EvolveTraining
    stages = (Stage("evolution", "generations"),)
    references = (_REFERENCE, "added-delay-inferred", "prefix-load")

    def __init__(self, config: EvolveTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        texts = [*RULES_AS_SCORES.values(), *config.starts]
        starts = {str(found): found for found in map(parse, texts)}
        self.evolution = Evolution(
            list(starts.values()),
            Proportions(config.num_candidates, config.max_parts, config.price),
        )
        self._present = parse(RULES_AS_SCORES[_REFERENCE])

    @staticmethod
    @override
    def completed(config: EvolveTraining, scenario: Scenario) -> EvolveTraining:
        if scenario.spec.disaggregated or scenario.orders_fleet:
            raise ConfigError(
                f"--learner evolve finds who gets a request, and in {scenario.name} requests are"
                " placed or ordered, too: take another learner"
            )
        for text in config.starts:
            parse(text)
        return config

    @override
    def _validation_episodes(self) -> list[Episode]:
        config = self.config
        return self.episodes(FIRST_SEED, config.num_validation, _LONGER * config.num_requests)

    def _play(self, policy: Policy, episodes: Sequence[Episode]) -> Simulator:
        simulator = Simulator(self.scenario.spec, episodes)
        run(simulator, policy)
        return simulator

    @override
    def validate(self) -> Validated:
        return self.validated_by(self._play(score_policy(self._present), self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        return self.validated_by(self._play(policy(name), self._validation))

    @override
    def improve(self) -> dict[str, float]:
        config = self.config
        first_seed = self.draw_first_seed()
        episodes = self.episodes(first_seed, config.num_episodes, config.num_requests)
        usual = self._losses(parse(RULES_AS_SCORES[_REFERENCE]), episodes)

        def loss(expression: Expression) -> float:
            first = float((self._losses(expression, episodes[:1]) - usual[:1]).mean())
            if len(episodes) == 1 or not first < _HOPELESS:
                return first
            rest = self._losses(expression, episodes[1:]) - usual[1:]
            return float((first + rest.sum()) / len(episodes))

        self.evolution.step(loss, self._rng)
        best = self.evolution.best
        self._present = best.expression
        return {
            "rollout/return": -best.loss,
            "train/parts": float(best.expression.size),
            "train/age": float(best.age),
        }

    def _losses(self, expression: Expression, episodes: Sequence[Episode]) -> np.ndarray:
        return losses(self.scenario, self._play(score_policy(expression), episodes))

    @override
    def parameters(self) -> str:
        return str(self._present)

    @override
    def take_best(self) -> None:
        self._present = parse(self.best)

    @override
    def found(self) -> Expression:
        return parse(self.best)

    @override
    def export(self, folder: Path | None = None) -> Path:
        """Write the best as a policy."""
        score = score_policy(self.found())
        return save_score(
            score,
            folder or self.folder.path / "policy",
            sample_rows(
                score,
                self.scenario.spec,
                self.episodes(1, _NUM_SAMPLED, self.config.num_requests),
                self.config.seed,
            ),
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training={
                "algorithm": "genetic search",
                "generations": self.generation,
                "minutes": round(self.spent_s / 60.0, 2),
                "seed": self.config.seed,
                "validation_loss": round(float(self.best_scores.mean()), 5),
            },
        )

    @override
    def state(self) -> dict[str, Any]:
        return {
            "evolution": self.evolution.state(),
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        parse(self.best)
        self.evolution.restore(content["evolution"])
        self._rng.bit_generator.state = json.loads(content["rng"])
