"""Training a scheduler of jobs: a search for its linear part, then PPO for all of it.

Episodes are played to their ends in compiled code, network included; PyTorch only learns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.agents.workflow_network import WorkflowNetwork
from servegym.agents.workflow_policy import LearnedRule, learned_rule
from servegym.baselines.workflow.online.registry import online_rule
from servegym.export.workflow import DecisionSample, export_scheduler
from servegym.train.job_shop import RandomJobShops
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.training_run import Stage, TrainingRun, copied
from servegym.train.validation import FIRST_SEED, Validated
from servegym.train.workflow_arrays import decision_samples
from servegym.train.workflow_ppo import WorkflowPPO
from servegym.train.workflow_rollout import Played, play
from servegym.train.workflow_search import (
    first_search,
    linear_loss,
    losses,
    time_unit_s,
    validated,
)
from servegym.train.workflow_settings import WorkflowTraining
from servegym.typing import FloatArray
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.spec import Episode
from servegym.workflow_scenario import WorkflowScenario, load_workflow_scenario

#: Factors on the scores of the search that are tried.
SHARPENINGS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_SEARCH_VALIDATES_EVERY = 5  # generations

TrainingScenario = WorkflowScenario | RandomJobShops


class WorkflowTrainer(TrainingRun[WorkflowTraining, TrainingScenario, WorkflowNetwork]):
    """A run that trains a scheduler of jobs; `found` is its network."""

    problem = "workflow"
    settings = WorkflowTraining
    stages = (Stage("search", "generations"), Stage("PPO", "updates"))
    references = ("srpt-cp", "mct", "hexgen")

    def __init__(self, config: WorkflowTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        scenario = self.scenario
        self.objective = config.objective or scenario.objective
        torch.manual_seed(config.seed)
        torch.set_num_threads(1)
        self.pool = scenario.draw_jobs(config.seed, config.pool_size)
        few = [scenario.episode(i, num_jobs=config.num_jobs[1], pool=self.pool) for i in range(8)]
        network = config.network.model_copy(update={"tau_s": time_unit_s(scenario.spec, few)})
        self.config = replace(config, network=network)
        self.network = WorkflowNetwork(network)
        self.ppo = WorkflowPPO(self.config, self.network)
        self.search = first_search(network.base)
        self._set_theta(self.search.mean)
        self.validation = self._validation_episodes()

    @staticmethod
    def load_scenario(name_or_path: str) -> TrainingScenario:
        """Return a scenario of jobs, or random job shops by their name."""
        if name_or_path == RandomJobShops.name:
            return RandomJobShops()
        return load_workflow_scenario(name_or_path)

    @classmethod
    @override
    def stored_scenario(cls, contents: Mapping[str, Any]) -> TrainingScenario:
        if contents["name"] == RandomJobShops.name:
            low, high = contents["machines"]
            return RandomJobShops((low, high))
        return WorkflowScenario.model_validate(contents)

    @staticmethod
    @override
    def scenario_contents(scenario: TrainingScenario) -> dict[str, Any]:
        if isinstance(scenario, RandomJobShops):
            return {"name": scenario.name, "machines": list(scenario.machines)}
        return TrainingRun.scenario_contents(scenario)

    @property
    def update(self) -> int:
        """Updates by PPO up to now."""
        return self.updates[1]

    @property
    @override
    def validate_every(self) -> int:
        return self.config.validate_every if self.stage else _SEARCH_VALIDATES_EVERY

    @override
    def share_of_updates(self) -> float:
        return self.update / max(1, self.config.max_updates)

    def goes_on(self) -> bool:
        """Whether another generation or update has time, and what must follow it, too."""
        c, ahead_s = self.config, self.update_s + self.validate_s
        if self.stage == 1:
            return self.update < c.max_updates and self.budget.fits(ahead_s)
        if self.search.generation >= c.max_generations:
            return False
        if self.search.generation == 0 and c.search_share > 0:
            return True
        closing_s = len(SHARPENINGS) * self.validate_s
        in_share = self.budget.fits(self.update_s, c.search_share)
        return in_share and self.budget.fits(ahead_s + closing_s)

    def warm_up(self) -> None:
        """Compile, and see how long a validation takes."""
        self._play(
            [self.scenario.episode(FIRST_SEED, num_jobs=1)],
            learned_rule(self.network.weights(), sample=True),
        )
        self._validated()

    @override
    def improve(self) -> dict[str, float]:
        return self._ppo() if self.stage else self._search()

    @override
    def close_stage(self) -> None:
        if self.stage == 0:
            self.take_best()
            self._sharpen()

    @override
    def parameters(self) -> dict[str, Tensor]:
        return copied(self.network)

    @override
    def take_best(self) -> None:
        self.network.load_state_dict(self.best)

    @override
    def found(self) -> WorkflowNetwork:
        return self.network

    def export(self, folder: Path | None = None) -> Path:
        """Export with decisions from the training scenario to check against."""
        samples = self.samples()
        return export_scheduler(
            self.network,
            folder or self.folder.path / "policy",
            samples,
            scenario=self.config.scenario,
            objective=self.objective,
            training={
                "algorithm": "cross-entropy search and ppo",
                "generations": self.search.generation,
                "updates": self.update,
                "minutes": round(self.spent_s / 60.0, 2),
                "seed": self.config.seed,
                "gain": round(self.gain, 4),
            },
        )

    def samples(self, count: int = 64) -> list[DecisionSample]:
        """Take decisions from a training episode of each of three loads, for the export."""
        self.network.load_state_dict(self.best)
        rng = np.random.default_rng((self.config.seed, 3))
        episodes = self._episodes(rng, np.linspace(*self.config.load, 3))
        played = self._play(episodes, learned_rule(self.network.weights()))
        return [x for one in played for x in decision_samples(one, -(-count // 3))]

    def _play(self, episodes: list[Episode], policy: LearnedRule, seed: int = 0) -> list[Played]:
        return play(
            self.scenario.spec,
            episodes,
            policy,
            objective=self.objective,
            tau_s=self.config.network.tau_s,
            seed=seed,
        )

    def _episodes(self, rng: np.random.Generator, loads: FloatArray) -> list[Episode]:
        low, high = self.config.num_jobs
        return [
            self.scenario.episode(
                int(rng.integers(FIRST_SEED)),
                load=float(load),
                num_jobs=int(rng.integers(low, high + 1)),
                pool=self.pool,
            )
            for load in loads
        ]

    def _validation_episodes(self) -> list[Episode]:
        count = self.config.validation_episodes
        loads = np.linspace(*self.config.load, min(3, count))
        return [
            self.scenario.episode(
                FIRST_SEED + i, load=float(loads[i % len(loads)]), num_jobs=self.config.num_jobs[1]
            )
            for i in range(count)
        ]

    def validate(self) -> Validated:
        """Play the validation episodes greedily."""
        return self._validated_by(learned_rule(self.network.weights()))

    @override
    def validate_rule(self, name: str) -> Validated:
        return self._validated_by(online_rule(name))

    def _validated_by(self, policy: WorkflowPolicy) -> Validated:
        return validated(self.scenario.spec, self.validation, policy, self.objective)

    def _search(self) -> dict[str, float]:
        c = self.config
        rng = np.random.default_rng((c.seed, self.search.generation))
        episodes = self._episodes(rng, np.linspace(*c.load, c.search_episodes))
        loss = linear_loss(
            self.scenario.spec,
            episodes,
            self.objective,
            c.network.base,
            c.network.eta,
            c.network.tau_s,
        )
        found = self.search.step(loss, rng)
        self._set_theta(self.search.mean)
        return {"rollout/return": -found, "train/spread": float(self.search.spread.mean())}

    def _set_theta(self, theta: FloatArray) -> None:
        with torch.no_grad():
            self.network.theta.weight.copy_(torch.from_numpy(theta)[None])

    def _sharpen(self) -> None:
        """Multiply the scores till draws from them are almost as good as they can be.

        The search only looks at which score is the greatest; PPO needs probabilities too. Among
        equal scores the greatest is always the first, draws take any of them, so draws may never
        be as good as the greatest and are compared with each other.
        """
        if self.network.config.base != "none":
            return  # the base rule's scores are on their own scale already
        theta = self.network.theta.weight[0].detach().double().numpy().copy()
        found = []
        for factor in SHARPENINGS:
            self._set_theta(factor * theta)
            drawn = learned_rule(self.network.weights(), sample=True)
            scores = losses(self.scenario.spec, self.validation, drawn, self.objective)
            found.append(float(scores.mean()))
        enough = np.array(found) <= min(found) + self.config.sharpness
        self._set_theta(SHARPENINGS[int(enough.argmax())] * theta)
        self.best = self.parameters()

    def _ppo(self) -> dict[str, float]:
        c = self.config
        rng = np.random.default_rng((c.seed, 1, self.update))
        drawn = self._episodes(rng, rng.uniform(*c.load, c.groups))
        episodes = [episode for episode in drawn for _ in range(c.group_size)]
        policy = learned_rule(self.network.weights(), sample=True)
        played = self._play(episodes, policy, int(rng.integers(2**31)))
        returns = float(np.mean([one.earned[-1] for one in played]))
        stats = self.ppo.learn(played, self.update, 1.0 - self.budget.share())
        return {"rollout/return": returns, **stats}

    @override
    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.ppo.optimizer.state_dict(),
            "scale": self.ppo.scale,
            "search": self.search.state(),
            "rng": torch.get_rng_state(),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.take_best()
        self.network.load_state_dict(content["network"])
        self.ppo.optimizer.load_state_dict(content["optimizer"])
        self.ppo.scale = float(content["scale"])
        self.search = Search.of(content["search"])
        torch.set_rng_state(content["rng"])
