"""Training a scheduler of jobs: a search for its linear part, then PPO for all of it.

Episodes are played to their ends in compiled code, network included; PyTorch only learns.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from servegym.agents.workflow_network import Graph, Pairs, WorkflowNetwork
from servegym.agents.workflow_policy import LearnedRule, learned_rule
from servegym.export.workflow import DecisionSample
from servegym.train.budget import Budget
from servegym.train.job_shop import RandomJobShops
from servegym.train.run_folder import RunFolder, restoring
from servegym.train.validation import FIRST_SEED
from servegym.train.workflow_arrays import (
    advantages,
    as_graph,
    as_pairs,
    choices,
    decision_samples,
    discounted,
)
from servegym.train.workflow_rollout import Played, play
from servegym.train.workflow_search import (
    Search,
    linear_loss,
    losses,
    time_unit_s,
)
from servegym.train.workflow_settings import WorkflowTraining
from servegym.typing import FloatArray
from servegym.workflow.online.spec import Episode
from servegym.workflow_scenario import WorkflowScenario, load_workflow_scenario

_log = logging.getLogger(__name__)

#: Factors on the scores of the search that are tried.
SHARPENINGS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def training_scenario(name_or_path: str) -> WorkflowScenario | RandomJobShops:
    """Return a scenario of jobs, or random job shops by their name."""
    if name_or_path == RandomJobShops.name:
        return RandomJobShops()
    return load_workflow_scenario(name_or_path)


class WorkflowTrainer:
    """A training run in a folder: config, TensorBoard log and checkpoint."""

    def __init__(self, config: WorkflowTraining, folder: Path) -> None:
        self._created_s = time.monotonic()
        scenario = training_scenario(config.scenario)
        self.scenario = scenario
        self.folder = RunFolder(folder, "scheduler", config, contents(scenario))
        self.objective = config.objective or scenario.objective
        torch.manual_seed(config.seed)
        torch.set_num_threads(1)
        self.pool = scenario.draw_jobs(config.seed, config.pool_size)
        few = [scenario.episode(i, num_jobs=config.num_jobs[1], pool=self.pool) for i in range(8)]
        tau_s = time_unit_s(scenario.spec, few)
        network = config.network.model_copy(update={"tau_s": tau_s})
        self.config = replace(config, network=network)
        self.network = WorkflowNetwork(network)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, eps=1e-5
        )
        self.search = Search.begin(network.base)
        self._set_theta(self.search.mean)
        self.update, self.spent_s, self.scale = 0, 0.0, 0.0
        self.searched = self.finished = self._prepared = False
        self.budget = Budget(config.max_minutes)
        self._generation_s = self._update_s = self._validate_s = 0.0
        self.history: list[dict[str, float]] = []
        self.validation = self._validation_episodes()
        self.first_scores = self.best_scores = self._validate()
        self.best = _copy(self.network)

    def prepare(self) -> float:
        """Compile, and go on from the checkpoint if there is one.

        Returns:
            Seconds since the trainer was made; the budget begins to count now.

        Raises:
            ConfigError: If the checkpoint is broken.
            OutputError: If the folder cannot be written.
        """
        content = self.folder.begin()
        if content is not None:
            self._restore(content)
        if not self.finished:
            self._play(
                [self.scenario.episode(FIRST_SEED, num_jobs=1)],
                learned_rule(self.network.weights(), sample=True),
            )  # compiles
            self._validate()  # says how long it takes
        self.budget.start(self.spent_s)
        self._prepared = True
        return time.monotonic() - self._created_s

    def run(self, progress: Callable[[str, float], None] = lambda text, share: None) -> None:
        """Train to the end or the time limit, going on from a checkpoint if there is one."""
        if not self._prepared:
            self.prepare()
        if not self.finished:
            with self.folder.tensorboard(self._step + 1) as writer:
                if not self.searched:
                    self._search(writer, progress)
                self._improve(writer, progress)
            self._keep_the_better()
            self.finished = True
            self._save()
        self.network.load_state_dict(self.best)

    @property
    def _step(self) -> int:
        """Generations and updates: what the log counts."""
        return self.search.generation + self.update

    def _improve(self, writer: SummaryWriter, progress: Callable[[str, float], None]) -> None:
        c = self.config
        while self.update < c.max_updates and self.budget.fits(self._update_s + self._validate_s):
            begin_s = time.monotonic()
            stats = self._ppo()
            self._update_s = time.monotonic() - begin_s
            self.update += 1
            if self.update % c.validate_every == 0:
                stats["validation/gain"] = self._keep_the_better()
                self._save()
            for key, value in stats.items():
                writer.add_scalar(key, value, self._step)
            self.history.append(stats)
            _log.info("update %d: %s", self.update, stats)
            progress(f"PPO {self.gain:+.3f}", self._share())

    @property
    def gain(self) -> float:
        """How much better the best network is than the first one, in units of `losses`."""
        return float((self.first_scores - self.best_scores).mean())

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

    def _validate(self) -> FloatArray:
        begin_s = time.monotonic()
        policy = learned_rule(self.network.weights())
        found = losses(self.scenario.spec, self.validation, policy, self.objective)
        self._validate_s = time.monotonic() - begin_s
        return found

    def _keep_the_better(self) -> float:
        scores = self._validate()
        if scores.mean() < self.best_scores.mean():
            self.best, self.best_scores = _copy(self.network), scores
        return float((self.first_scores - scores).mean())

    def _share(self) -> float:
        """Share of the run that is over, by updates or by the clock."""
        most = max(1, self.config.max_updates)
        return min(1.0, max(self.update / most, self.budget.share()))

    def _goes_on_searching(self) -> bool:
        """Whether another generation has a place in the budget, and what must follow it too."""
        c = self.config
        if self.search.generation >= c.max_generations:
            return False
        closing_s = (1 + len(SHARPENINGS)) * self._validate_s
        if self.search.generation == 0 and c.search_share > 0:
            return True
        return self.budget.fits(self._generation_s, c.search_share) and self.budget.fits(
            self._generation_s + closing_s
        )

    def _search(self, writer: SummaryWriter, progress: Callable[[str, float], None]) -> None:
        c = self.config
        while self._goes_on_searching():
            begin_s = time.monotonic()
            rng = np.random.default_rng((c.seed, self.search.generation))
            loads = np.linspace(*c.load, c.search_episodes)
            episodes = self._episodes(rng, loads)
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
            writer.add_scalar("search/loss", found, self.search.generation)
            if self.search.generation % 5 == 0:
                gain = self._keep_the_better()
                _log.info("generation %d: gain %.4f", self.search.generation, gain)
                writer.add_scalar("validation/gain", gain, self.search.generation)
                self._save()
            self._generation_s = time.monotonic() - begin_s
            progress(f"search {self.gain:+.3f}", self._share())
        self._keep_the_better()
        self.network.load_state_dict(self.best)
        self._sharpen()
        self.searched = True
        self._save()

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
        self.best = _copy(self.network)

    def _ppo(self) -> dict[str, float]:
        c = self.config
        rng = np.random.default_rng((c.seed, 1, self.update))
        drawn = self._episodes(rng, rng.uniform(*c.load, c.groups))
        episodes = [episode for episode in drawn for _ in range(c.group_size)]
        policy = learned_rule(self.network.weights(), sample=True)
        played = self._play(episodes, policy, int(rng.integers(2**31)))
        rows = [(as_pairs([one]), as_graph([one])) for one in played]
        with torch.no_grad():
            values = [self.network.values(pairs).double().numpy() for pairs, _ in rows]
            old = [self._log_probs(*row, one)[0] for row, one in zip(rows, played, strict=True)]
        advantages, targets = self._advantages(played, values)
        return self._learn(played, old, advantages, targets)

    def _advantages(
        self, played: Sequence[Played], values: Sequence[FloatArray]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        """Compare each episode with the others of its group, at the same moments."""
        c = self.config
        horizon_s, credit_s = c.horizon * c.network.tau_s, c.credit * c.network.tau_s
        if self.scale == 0.0:
            returns = [discounted(one, horizon_s) for one in played]
            self.scale = max(1e-9, float(np.concatenate(returns).std()))
        found = [
            advantages(one, value, horizon_s, credit_s, self.scale)
            for one, value in zip(played, values, strict=True)
        ]
        targets = [a + v for a, v in zip(found, values, strict=True)]
        compared = []
        for first in range(0, len(played), c.group_size):
            group = range(first, first + c.group_size)
            for i in group:
                others = [
                    np.interp(played[i].time_s, played[k].time_s, found[k], right=0.0)
                    for k in group
                    if k != i
                ]
                compared.append(found[i] - np.mean(others, 0))
        spread = float(np.concatenate(compared).std()) + 1e-8
        return [a / spread for a in compared], targets

    def _log_probs(
        self, pairs: Pairs, graph: Graph, one: Played | Sequence[Played]
    ) -> tuple[Tensor, Tensor]:
        """Logarithms of the probabilities of what was chosen, and entropies, per decision."""
        several = [one] if isinstance(one, Played) else one
        scores = self.network.scores(pairs, graph)
        counts = np.concatenate([np.diff(x.first) for x in several])
        first = torch.from_numpy(np.cumsum(counts) - counts)
        chosen = np.concatenate([x.chosen for x in several])
        may_wait = torch.from_numpy(np.concatenate([x.may_wait for x in several]) > 0)
        return choices(
            scores,
            pairs.decision,
            first,
            torch.from_numpy(chosen),
            torch.from_numpy(counts),
            may_wait,
        )

    def _learn(
        self,
        played: Sequence[Played],
        old: Sequence[Tensor],
        advantages_: Sequence[FloatArray],
        targets: Sequence[FloatArray],
    ) -> dict[str, float]:
        c = self.config
        warm = self.update < c.warmup_updates
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * max(
            0.02, 1.0 - self.budget.share()
        )
        kl, clipped, errors, entropies = 0.0, [], [], []
        for _ in range(c.epochs):
            order = np.random.default_rng((c.seed, 2, self.update)).permutation(len(played))
            kls = []
            for part in np.array_split(order, min(c.minibatches, len(played))):
                some = [played[i] for i in part]
                pairs, graph = as_pairs(some), as_graph(some)
                log_prob, entropy = self._log_probs(pairs, graph, some)
                log_ratio = log_prob - torch.cat([old[i] for i in part])
                ratio = log_ratio.exp()
                a = torch.from_numpy(np.concatenate([advantages_[i] for i in part])).float()
                gain = torch.minimum(ratio * a, ratio.clamp(1 - c.clip, 1 + c.clip) * a).mean()
                target = torch.from_numpy(np.concatenate([targets[i] for i in part])).float()
                error = 0.5 * (self.network.values(pairs) - target).square().mean()
                loss = 0.5 * error
                if not warm:
                    loss = loss - gain - c.entropy * entropy.mean()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 0.5)
                self.optimizer.step()
                with torch.no_grad():
                    kls.append(float((ratio - 1 - log_ratio).mean()))
                    clipped.append(float(((ratio - 1).abs() > c.clip).float().mean()))
                    errors.append(float(error))
                    entropies.append(float(entropy.mean()))
            kl = float(np.mean(kls))
            if kl > c.target_kl:
                break
        return {
            "train/approx_kl": kl,
            "train/clip_fraction": float(np.mean(clipped)),
            "train/value_loss": float(np.mean(errors)),
            "train/entropy": float(np.mean(entropies)),
            "train/decisions": float(sum(len(one.chosen) for one in played)),
        }

    def _save(self) -> None:
        """Write all that the rest of the run depends on."""
        self.spent_s = self.budget.spent_s
        self.folder.save(
            f"{self.search.generation} generations and {self.update} updates",
            {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "best_scores": torch.from_numpy(self.best_scores),
                "update": self.update,
                "spent_s": self.spent_s,
                "scale": self.scale,
                "search": self.search.state(),
                "searched": self.searched,
                "rng": torch.get_rng_state(),
                "finished": self.finished,
            },
        )

    def _restore(self, content: dict[str, Any]) -> None:
        with restoring(self.folder.path):
            self.best, self.best_scores = content["best"], content["best_scores"].numpy()
            self.network.load_state_dict(self.best)
            self.network.load_state_dict(content["network"])
            self.optimizer.load_state_dict(content["optimizer"])
            self.update, self.spent_s = int(content["update"]), float(content["spent_s"])
            self.scale = float(content["scale"])
            self.search = Search.of(content["search"])
            self.searched, self.finished = bool(content["searched"]), bool(content["finished"])
            torch.set_rng_state(content["rng"])


def contents(scenario: WorkflowScenario | RandomJobShops) -> dict[str, Any]:
    """Return what a scenario says, as the configuration of a run holds it."""
    if isinstance(scenario, WorkflowScenario):
        return scenario.model_dump(mode="json")
    return {"name": scenario.name, "machines": list(scenario.machines)}


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
