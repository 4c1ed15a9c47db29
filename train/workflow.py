"""Training a scheduler of jobs: a search for its linear part, then PPO for all of it.

Episodes are played to their ends in compiled code, network included; PyTorch only learns.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import servegym
from servegym.agents.workflow_network import (
    MAX_EXPORTED_DEPTH,
    Graph,
    Pairs,
    WorkflowNetwork,
    WorkflowNetworkConfig,
)
from servegym.agents.workflow_policy import learned_rule
from servegym.errors import ConfigError, ExportError
from servegym.export.workflow import DecisionSample
from servegym.train.job_shop import RandomJobShops
from servegym.train.ppo import read_checkpoint
from servegym.train.validation import FIRST_SEED
from servegym.train.workflow_rollout import Played, play
from servegym.train.workflow_search import (
    OBJECTIVES,
    Search,
    linear_loss,
    losses,
    time_unit_s,
)
from servegym.typing import FloatArray, IntArray
from servegym.workflow.online.spec import Episode
from servegym.workflow_scenario import WorkflowScenario, load_workflow_scenario

_log = logging.getLogger(__name__)

#: Factors on the scores of the search that are tried.
SHARPENINGS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class WorkflowTraining:
    """Settings of a training run."""

    scenario: str = "text-to-sql"
    """Bundled scenario name or YAML file, or `job-shop`: small random job shops."""
    objective: str = ""
    """`jct`, `makespan` or `deadline`; by default the scenario's."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    num_jobs: tuple[int, int] = (20, 80)
    """Range of the number of jobs of an episode, drawn anew: no policy can learn when it ends."""
    pool_size: int = 1000
    """Different jobs to train on."""
    max_minutes: float = 10.0
    """Wall-clock time of both parts."""
    search_share: float = 0.8
    """Share of it for the search, which brings nearly all of the gain."""
    search_episodes: int = 6
    """Of a generation, spread over the loads."""
    max_updates: int = 100_000
    """Of PPO, at most."""
    groups: int = 4
    """Arrival sequences of an update."""
    group_size: int = 4
    """Episodes with the same arrivals; the group is the baseline of its members."""
    learning_rate: float = 3e-4
    """Adam's, falling linearly to 0."""
    horizon: float = 40.0
    """Discount: a reward t ahead counts exp(-t / horizon), in mean durations of a stage."""
    credit: float = 10.0
    """Time constant of generalised advantage estimation, in the same unit."""
    epochs: int = 3
    """Passes over an update's episodes."""
    minibatches: int = 4
    """Gradient steps of a pass; each takes whole episodes, so their graphs are embedded once."""
    clip: float = 0.2
    """PPO's ratio clip."""
    entropy: float = 0.001
    """Entropy bonus."""
    target_kl: float = 0.03
    """An update ends early above this divergence."""
    warmup_updates: int = 5
    """First updates train the critic alone."""
    sharpness: float = 0.02
    """How much worse draws from the first policy may be than from sharper ones: by that the factor
    on the scores of the search is chosen."""
    validate_every: int = 5
    """Updates between validations; the best network is kept."""
    validation_episodes: int = 18
    """Which are neither trained nor judged on."""
    seed: int = 0
    """Of everything."""
    network: WorkflowNetworkConfig = field(default_factory=lambda: WorkflowNetworkConfig())
    """Network and base rule; the time unit is measured."""

    def __post_init__(self) -> None:
        if self.objective and self.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        for name in ("load", "num_jobs"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name} must be two ascending numbers above 0, got {low, high}")
        if not self.max_minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.max_minutes:g}")
        if not 0 <= self.search_share <= 1:
            raise ConfigError(f"search_share must be within 0..1, got {self.search_share:g}")
        for name in ("groups", "minibatches", "validation_episodes", "search_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group_size < 2:
            raise ConfigError(
                f"group_size must be at least 2, so that there are others to compare with, got"
                f" {self.group_size}"
            )


def training_scenario(name_or_path: str) -> WorkflowScenario | RandomJobShops:
    """Return a scenario of jobs, or random job shops by their name."""
    if name_or_path == RandomJobShops.name:
        return RandomJobShops()
    return load_workflow_scenario(name_or_path)


class WorkflowTrainer:
    """A training run in a folder: config, TensorBoard log and checkpoint."""

    def __init__(self, config: WorkflowTraining, folder: Path) -> None:
        scenario = training_scenario(config.scenario)
        self.scenario, self.folder = scenario, folder
        self.objective = config.objective or scenario.objective
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be made a folder: {error.strerror}") from error
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
        self.history: list[dict[str, float]] = []
        self.validation = self._validation_episodes()
        self.first_scores = self.best_scores = self._validate()
        self.best = _copy(self.network)

    def run(self, progress: Callable[[str, float], None] = lambda text, share: None) -> None:
        """Train to the end or the time limit, going on from a checkpoint if there is one."""
        self.resume()
        self._write_config()
        self._clock_s = time.perf_counter() - self.spent_s
        writer = SummaryWriter(str(self.folder / "tensorboard"))
        if self.update == 0:
            self._search(writer, progress)
        while self.update < self.config.max_updates and self._share() < 1.0:
            stats = self._ppo()
            self.update += 1
            if self.update % self.config.validate_every == 0:
                stats["validation/gain"] = self._keep_the_better()
                self._save()
            for key, value in stats.items():
                writer.add_scalar(key, value, self.update)
            self.history.append(stats)
            _log.info("update %d: %s", self.update, stats)
            progress(f"PPO {self.gain:+.3f}", self._share())
        self._keep_the_better()
        self._save()
        writer.close()
        self.network.load_state_dict(self.best)

    @property
    def gain(self) -> float:
        """How much better the best network is than the first one, in units of `losses`."""
        return float((self.first_scores - self.best_scores).mean())

    def samples(self, count: int = 64) -> list[DecisionSample]:
        """Take decisions from a training episode of each of three loads, for the export."""
        self.network.load_state_dict(self.best)
        rng = np.random.default_rng((self.config.seed, 3))
        played = play(
            self.scenario.spec,
            self._episodes(rng, np.linspace(*self.config.load, 3)),
            learned_rule(self.network.weights()),
            objective=self.objective,
            tau_s=self.config.network.tau_s,
        )
        return [x for one in played for x in decision_samples(one, -(-count // 3))]

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
        policy = learned_rule(self.network.weights())
        return losses(self.scenario.spec, self.validation, policy, self.objective)

    def _keep_the_better(self) -> float:
        scores = self._validate()
        if scores.mean() < self.best_scores.mean():
            self.best, self.best_scores = _copy(self.network), scores
        return float((self.first_scores - scores).mean())

    def _share(self) -> float:
        self.spent_s = time.perf_counter() - self._clock_s
        return self.spent_s / (60.0 * self.config.max_minutes)

    def _search(self, writer: SummaryWriter, progress: Callable[[str, float], None]) -> None:
        c = self.config
        while self._share() < c.search_share:
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
                writer.add_scalar("search/gain", gain, self.search.generation)
                self._save()
            progress(f"search {self.gain:+.3f}", self._share())
        self._keep_the_better()
        self.network.load_state_dict(self.best)
        self._sharpen()
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
        played = play(
            self.scenario.spec,
            episodes,
            policy,
            objective=self.objective,
            tau_s=c.network.tau_s,
            seed=int(rng.integers(2**31)),
        )
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
        self.optimizer.param_groups[0]["lr"] = c.learning_rate * max(0.02, 1.0 - self._share())
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

    def _write_config(self) -> None:
        described = asdict(self.config) | {"network": self.config.network.model_dump()}
        described["objective"] = self.objective
        described["kind"] = "workflow"
        described["servegym_version"] = servegym.__version__
        (self.folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")

    def _save(self) -> None:
        """Write the checkpoint whole or not at all."""
        content = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_scores": torch.from_numpy(self.best_scores),
            "update": self.update,
            "spent_s": self.spent_s,
            "scale": self.scale,
            "search": [
                torch.from_numpy(self.search.mean),
                torch.from_numpy(self.search.spread),
                self.search.generation,
            ],
            "rng": torch.get_rng_state(),
            "made_for": self._made_for(),
        }
        part = self.folder / "checkpoint.part"
        torch.save(content, part)
        os.replace(part, self.folder / "checkpoint.pt")

    def _made_for(self) -> list[Any]:
        return [self.objective, *self.config.network.model_dump().values()]

    def resume(self) -> None:
        """Go on from the checkpoint in the folder, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        content = read_checkpoint(path)
        if content.get("made_for") != self._made_for():
            raise ConfigError(
                f"{path} was trained with another objective or network"
                f" ({content.get('made_for')}, not {self._made_for()}): choose a new output folder"
            )
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.best, self.best_scores = content["best"], content["best_scores"].numpy()
        self.update, self.spent_s = int(content["update"]), float(content["spent_s"])
        self.scale = float(content["scale"])
        mean, spread, generation = content["search"]
        self.search = Search(mean.numpy(), spread.numpy(), int(generation))
        torch.set_rng_state(content["rng"])


def as_pairs(played: Sequence[Played]) -> Pairs:
    """Lay the pairs of some episodes one behind the other."""
    stages = np.cumsum([0] + [len(one.stages) for one in played])
    jobs = np.cumsum([0] + [int(one.job.max()) + 1 for one in played])
    decisions = np.cumsum([0] + [len(one.chosen) for one in played])
    each = [np.repeat(np.arange(len(one.chosen)), np.diff(one.first)) for one in played]
    return Pairs(
        torch.from_numpy(np.concatenate([one.features for one in played])),
        torch.from_numpy(np.concatenate([one.base for one in played])),
        torch.from_numpy(
            np.concatenate([x.stage + n for x, n in zip(played, stages, strict=False)])
        ),
        torch.from_numpy(
            np.concatenate([x.job[x.stage] + n for x, n in zip(played, jobs, strict=False)])
        ),
        torch.from_numpy(np.concatenate([x + n for x, n in zip(each, decisions, strict=False)])),
        int(decisions[-1]),
    )


def as_graph(played: Sequence[Played]) -> Graph:
    """Lay the jobs of some episodes one behind the other."""
    stages = np.cumsum([0] + [len(one.stages) for one in played])
    jobs = np.cumsum([0] + [int(one.job.max()) + 1 for one in played])
    members = [np.flatnonzero(one.hidden == 0) for one in played]

    return Graph(
        torch.from_numpy(np.concatenate([one.stages for one in played])),
        _joined([one.parent for one in played], stages),
        _joined([one.child for one in played], stages),
        max(one.depth for one in played),
        _joined(members, stages),
        _joined([one.job[m] for one, m in zip(played, members, strict=True)], jobs),
        int(jobs[-1]),
    )


def decision_samples(one: Played, count: int) -> list[DecisionSample]:
    """Take decisions, evenly spread over an episode, with the jobs that they are about.

    Raises:
        ExportError: If a job has a longer way of stages than an exported graph can follow.
    """
    if one.depth > MAX_EXPORTED_DEPTH:
        raise ExportError(
            f"a job has {one.depth} known stages one behind the other, an exported graph follows at"
            f" most {MAX_EXPORTED_DEPTH}: train without message passing"
        )
    found = []
    for t in np.unique(np.linspace(0, len(one.chosen) - 1, count).astype(int)).tolist():
        rows = slice(int(one.first[t]), int(one.first[t + 1]))
        stage = one.stage[rows]
        jobs, job = np.unique(one.job[stage], return_inverse=True)
        inside = np.flatnonzero(np.isin(one.job, jobs))
        place = np.full(len(one.job), -1)
        place[inside] = np.arange(len(inside))
        children = np.zeros((len(inside), len(inside)), np.float32)
        edges = np.isin(one.parent, inside)
        children[place[one.parent[edges]], place[one.child[edges]]] = 1.0
        known = (one.job[inside] == jobs[:, None]) & (one.hidden[inside] == 0)
        members = known / np.maximum(1, known.sum(-1, keepdims=True))
        found.append(
            DecisionSample(
                one.features[rows],
                one.base[rows],
                place[stage],
                job.astype(np.int64),
                one.stages[inside],
                children,
                members.astype(np.float32),
            )
        )
    return found


def _joined(parts: Sequence[IntArray], offsets: IntArray) -> Tensor:
    """Lay index arrays one behind the other, each moved by its offset."""
    return torch.from_numpy(np.concatenate([x + n for x, n in zip(parts, offsets, strict=False)]))


def choices(
    scores: Tensor, decision: Tensor, first: Tensor, chosen: Tensor, count: Tensor, may_wait: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the softmax over each decision's pairs, and waiting with score 0, gives.

    Args:
        scores: Of all pairs, `float32[P]`.
        decision: Of each pair, `int64[P]`, ascending.
        first: First pair of each decision, `int64[D]`.
        chosen: Which of its pairs each decision took; `count` for waiting, `int64[D]`.
        count: Pairs of each decision, `int64[D]`.
        may_wait: Whether it could wait, `bool[D]`.

    Returns:
        Logarithm of the probability of what was chosen, and the entropy, `float32[D]` each.
    """
    size = len(first)
    with torch.no_grad():
        most = torch.where(may_wait, 0.0, -math.inf)
        most = most.scatter_reduce(0, decision, scores, "amax", include_self=True)
    waiting = torch.where(may_wait, (-most).exp(), 0.0)
    total = waiting.index_add(0, decision, (scores - most[decision]).exp())
    log_total = total.log() + most
    log_probs = scores - log_total[decision]
    waits = chosen == count
    picked = log_probs[(first + chosen).clamp(max=len(scores) - 1)]
    log_prob = torch.where(waits, -log_total, picked)
    entropy = scores.new_zeros(size).index_add(0, decision, -log_probs.exp() * log_probs)
    entropy = entropy + torch.where(may_wait, log_total * (-log_total).exp(), 0.0)
    return log_prob, entropy


def discounted(one: Played, horizon_s: float) -> FloatArray:
    """Return the discounted sum of rewards from each decision on, `float64[D]`."""
    rewards = np.diff(one.earned)
    gamma = np.exp(-np.diff(np.append(one.time_s, one.end_s)) / horizon_s)
    found = np.zeros(len(rewards) + 1)
    for t in range(len(rewards) - 1, -1, -1):
        # what is earned on the way is on average half the way ahead
        found[t] = math.sqrt(gamma[t]) * rewards[t] + gamma[t] * found[t + 1]
    return found[:-1]


def advantages(
    one: Played, values: FloatArray, horizon_s: float, credit_s: float, scale: float
) -> FloatArray:
    """Estimate advantages with discounts by time; episodes are played to their ends.

    Args:
        one: The episode.
        values: Of the states decided in, in units of `scale`, `float64[D]`.
        horizon_s: Time constant of the discount.
        credit_s: Time constant of lambda.
        scale: Rewards are divided by this.

    Returns:
        `float64[D]`.
    """
    rewards = np.diff(one.earned) / scale
    passed_s = np.diff(np.append(one.time_s, one.end_s))
    gamma, lam = np.exp(-passed_s / horizon_s), np.exp(-passed_s / credit_s)
    following = np.append(values[1:], 0.0)
    delta = np.sqrt(gamma) * rewards + gamma * following - values
    found, running = np.zeros(len(values)), 0.0
    for t in range(len(values) - 1, -1, -1):
        running = delta[t] + gamma[t] * lam[t] * running
        found[t] = running
    return found


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
