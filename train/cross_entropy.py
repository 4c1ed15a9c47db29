"""A search over a dispatcher's weights on whole episodes, for objectives that no reward sums up.

A percentile of an episode is nothing that single choices add to, so that neither returns nor labels
say what it wants. Whole episodes do: all candidates of a generation play the same ones, in compiled
code, and are judged as policies are. What is found is exported as a network like all others.
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

from servegym.agents.network import DispatchNetwork
from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError
from servegym.export.from_torch import export_policy
from servegym.export.sample import sample_observations
from servegym.policy.contract import observed_groups
from servegym.policy.costs import HELD_BASES
from servegym.policy.perceptron_rule import perceptron_rule
from servegym.policy.policy import Heuristic, Policy
from servegym.policy.run import run
from servegym.scenario import Scenario
from servegym.train.card import NAME as CARD
from servegym.train.card import card, changed
from servegym.train.cross_entropy_settings import CrossEntropyTraining, base_of
from servegym.train.dispatch_space import DispatchSpace, Observer
from servegym.train.labels import require_whole_requests
from servegym.train.mix import Part
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun
from servegym.train.validation import FIRST_SEED, Validated, judged
from servegym.typing import FloatArray
from servegym.whole_files import write_whole

#: Standard deviation of the first weights of the second stage, at most.
_SECOND_SPREAD = 0.1
#: Episodes that inputs are normalised by.
_NUM_SAMPLED = 4


class CrossEntropyTrainer(SearchRun[CrossEntropyTraining, DispatchNetwork]):
    """A run that searches a dispatcher; `found` is its network."""

    problem = "dispatch"
    settings = CrossEntropyTraining
    references = ("added-delay", "prefix-load", "mct")

    def __init__(self, config: CrossEntropyTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        base = policy(self.config.base)
        self._base, extended = base_of(config.base), config.extended
        observer = Observer(base, self._num_extra, extended=extended or self._base in HELD_BASES)
        observer.needs |= observed_groups(extended=extended)  # the score reads more than the rule
        run(Simulator(self.scenario.spec, self._sampled_episodes()), observer)
        replicas, request, _ = observer.samples()
        self.space = DispatchSpace(
            replicas,
            request,
            self._num_extra,
            self._base,
            base.params,
            extended=extended,
            holds_only=config.holds_only,
        )
        guess = self.space.rule_itself(base.params, config.eta)
        self.search = Search(guess, np.full(len(guess), config.spread))

    @staticmethod
    @override
    def completed(config: CrossEntropyTraining, scenario: Scenario) -> CrossEntropyTraining:
        require_whole_requests(scenario, "--learner search")
        base = base_of(config.base)
        if base in HELD_BASES and not scenario.actions.hold:
            raise ConfigError(
                f"base {base} holds requests, which {scenario.name} does not allow: add `actions: "
                "{hold: true}` to the scenario, or choose another base"
            )
        return config

    @property
    def _num_extra(self) -> int:
        actions = self.scenario.actions
        return int(actions.hold) + int(actions.reject)

    def _sampled_episodes(self) -> list[Episode]:
        return self.episodes(FIRST_SEED, _NUM_SAMPLED, self.config.num_requests)

    @override
    def _validation_episodes(self) -> list[Episode]:
        c = self.config
        return self.episodes(FIRST_SEED, c.num_validation, c.validation_requests)

    def _judged(self, policy: Policy) -> Validated:
        return judged(self.scenario, self._validation, policy)

    def _rule(self, theta: FloatArray) -> Heuristic:
        weights, nets = self.space.dispatchers(theta[None])
        return perceptron_rule(
            self._base, weights[0], nets, "candidate", extended=self.config.extended
        )

    def compiled(self) -> Heuristic:
        """Return the best as a compiled rule, which decides as what is exported does."""
        return self._rule(self.best.numpy())

    @override
    def validate(self) -> Validated:
        return self._judged(self._rule(self.search.mean))

    @override
    def validate_rule(self, name: str) -> Validated:
        return self._judged(policy(name))

    def open_stage(self) -> None:
        """Put hidden units beside the linear score."""
        if self.stage == 0:
            return
        start = self.space.with_units(self.best.numpy(), self.config.num_hidden, self._rng)
        self.best = torch.from_numpy(start)
        self.search = Search(
            start.copy(), np.full(len(start), min(_SECOND_SPREAD, self.config.spread))
        )

    @override
    def improve(self) -> dict[str, float]:
        """Narrow the distribution once."""
        c = self.config
        episodes = self.episodes(self.draw_first_seed(), c.num_episodes, c.num_requests)
        loss = self.search.step(
            lambda theta: float(judged(self.scenario, episodes, self._rule(theta)).scores.mean()),
            self._rng,
            size=c.num_candidates,
            elite=max(1, c.num_candidates // 4),
        )
        return {"rollout/return": -loss, "train/spread": float(self.search.spread.mean())}

    @override
    def parameters(self) -> Tensor:
        return torch.from_numpy(self.search.mean.copy())

    @override
    def take_best(self) -> None:
        self.space.dispatchers(self.best.numpy()[None])  # of the right size

    @override
    def found(self) -> DispatchNetwork:
        return self.space.network(self.best.numpy())

    @override
    def export(self, folder: Path | None = None) -> Path:
        """Export the network, with a card."""
        network, folder = self.found(), folder or self.folder.path / "policy"
        path = export_policy(
            network,
            folder,
            sample_observations(network, self.scenario, load=self.config.load),
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training={
                "algorithm": "cross-entropy search",
                "generations": self.generation,
                "seed": self.config.seed,
                "base": self.config.base,
                "validation_gain": self.gain,
            },
        )
        text = card(
            name=self.scenario.name,
            learner=self.config.learner,
            settings=changed(self.config),
            parts=[Part(scenario=self.scenario, load=self.config.load)],
            first_scores=self.first_scores,
            best_scores=self.best_scores,
            updates=self.generation,
            minutes=self.spent_s / 60.0,
        )
        write_whole({folder / CARD: text.encode()})
        return path

    @override
    def state(self) -> dict[str, Any]:
        return {"search": self.search.state(), "rng": json.dumps(self._rng.bit_generator.state)}

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.search = Search.of(content["search"])
        self._rng.bit_generator.state = json.loads(content["rng"])
        self.take_best()
