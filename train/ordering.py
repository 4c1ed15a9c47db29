"""Training an order inside an engine: a search over the weights of a perceptron.

First a score that is linear in the logarithms of a request's features, some twenty numbers: it can
be any product of powers, of which shortest remaining first is one. Then hidden units beside it. All
candidates of a generation play the same episodes, in compiled code, so what arrivals do cancels.
What is kept is what is best on validation episodes.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from servegym.baselines.ordering.registry import ordering_policy
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError, OutputError
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
from servegym.train.budget import Budget
from servegym.train.run_folder import RunFolder, restoring
from servegym.train.workflow_search import Search
from servegym.typing import FloatArray
from servegym.whole_files import unwritable

_log = logging.getLogger(__name__)

#: The request's own features; the engine's are the same in all rows and change no linear order.
_OWN = range(COMPUTED_TOKENS, NUM_RUNNING)
#: Validation episodes' seeds count from here; those that are held out begin at 1,000,000.
_VALIDATION_SEED = 500_000
#: Generations between validations.
_CHECK_EVERY = 5
#: Share of the time for the search of a linear score, where hidden units follow.
_LINEAR_SHARE = 0.4
#: Rows that say how features are distributed.
_NUM_SAMPLES = 20_000


@dataclass(frozen=True)
class OrderingTraining:
    """Settings of a run.

    Attributes:
        scenario: Bundled name or YAML file, of one engine that goes by priorities.
        load: Range of the load factor, drawn per episode.
        max_minutes: Wall-clock time, shared by both searches, from when all is compiled.
        max_generations: Generations of both, at most.
        num_hidden: Hidden units beside the linear score; 0 stops with that.
        num_candidates: Of a generation.
        num_episodes: That each of them plays.
        num_validation: Episodes by which the best is chosen.
        num_requests: Requests per episode, else the scenario's own.
        num_threads: Threads that share the work.
        seed: Of everything.
    """

    scenario: str = "kv-starved"
    load: tuple[float, float] = (0.6, 1.1)
    max_minutes: float = 10.0
    max_generations: int = 1_000_000
    num_hidden: int = 8
    num_candidates: int = 48
    num_episodes: int = 12
    num_validation: int = 32
    num_requests: int | None = None
    num_threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.load[0] <= self.load[1]:
            raise ConfigError(f"load must go from low to high, above 0, got {self.load}")
        if not self.max_minutes > 0:
            raise ConfigError(f"minutes must be above 0, got {self.max_minutes:g}")
        for name in ("max_generations", "num_candidates", "num_episodes", "num_validation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class Trained:
    """What a run found.

    Attributes:
        weights: The perceptron.
        loss: Its mean loss on the validation episodes, see `losses`.
        base_loss: That of `srpt`.
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


class OrderingTrainer:
    """One run; `run` returns what it found.

    Args:
        config: Settings.
        folder: Where config.json, checkpoint.pt, history.jsonl and tensorboard/ go.
    """

    def __init__(self, config: OrderingTraining, folder: Path) -> None:
        self._created_s = time.monotonic()
        self.config = config
        self.scenario = load_scenario(config.scenario)
        if not self.scenario.orders_requests:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority to train an order on it"
            )
        self.folder = RunFolder(folder, "order", config, self.scenario.model_dump(mode="json"))
        self._rng = np.random.default_rng(config.seed)
        self._validation = self._episodes(_VALIDATION_SEED, config.num_validation)
        self.samples = self._sample()
        logs = np.copysign(np.log1p(np.abs(self.samples)), self.samples)
        self._mean = logs.mean(0)
        spread = logs.std(0)
        # of a feature that never differs in training nothing is learned: it is given no weight
        self._varies = spread > 1e-6
        self._scale = np.where(self._varies, spread, 1.0)
        self._linear = [k for k in _OWN if self._varies[k]]
        self.budget = Budget(config.max_minutes)
        self.spent_s, self.finished, self._prepared = 0.0, False, False
        # the first search is for the linear score, the second for hidden units beside it
        self.stage, self.generation = 0, 0
        self.best = self._first_guess()
        self.best_loss = self.first_loss = math.inf
        self.search = Search(self.best.copy(), np.full(len(self.best), 0.3))
        self._next_check = _CHECK_EVERY
        self._generation_s = self._check_s = 0.0

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

    def loss(self, thetas: FloatArray, episodes: list[Episode]) -> FloatArray:
        """Return the mean loss of each of some weights on the same episodes, `float64[C]`."""
        nets = self.perceptrons(thetas)
        threads = self.config.num_threads
        played = play_perceptrons(self.scenario.spec, episodes, nets, threads)
        found: FloatArray = losses(self.scenario, played.state.env)
        return found.reshape(len(thetas), len(episodes)).mean(1)

    def base_loss(self, text: str) -> float:
        """Return the mean loss of an order by name on the validation episodes."""
        policy = ordering_policy(text)
        simulator = make_simulator(self.scenario.spec, self._validation, policy)
        run_ordering(simulator, policy)
        return float(losses(self.scenario, simulator.state.env).mean())

    def _first_guess(self) -> FloatArray:
        """Shortest remaining first, for both heads."""
        theta = np.zeros((2, len(self._linear)))
        theta[:, self._linear.index(PREDICTED_REMAINING_TOKENS)] = 1.0
        return theta.ravel()

    def prepare(self) -> float:
        """Compile, and go on from the checkpoint if there is one.

        Returns:
            Seconds since the trainer was made; the budget begins to count now.

        Raises:
            ConfigError: If the checkpoint is broken.
            OutputError: If the folder cannot be written.
        """
        content = self.folder.begin()
        if content is None:
            self.best_loss = self.first_loss = self._check(self.best)
            _log.info("srpt: validation loss %.4f", self.first_loss)
        else:
            self._restore(content)
            if not self.finished:
                self._check(self.best)  # compiles
        self.budget.start(self.spent_s)
        self._prepared = True
        return time.monotonic() - self._created_s

    def run(self, progress: Callable[[str, float], None] = lambda text, share: None) -> Trained:
        """Search, and return the best on validation episodes.

        Args:
            progress: Called with what is done and the share of the time.
        """
        if not self._prepared:
            self.prepare()
        if not self.finished:
            with self.folder.tensorboard(self.generation + 1) as writer:
                while not self.finished:
                    self._play_generation(writer)
                    text = f"{self._stage_name}, best validation loss {self.best_loss:.4f}"
                    progress(text, self._share())
        return self.found()

    def found(self) -> Trained:
        """Return the best up to now."""
        nets = self.perceptrons(self.best[None])
        weights = OrderingWeights(
            mean=nets.mean.astype(np.float32),
            scale=nets.scale.astype(np.float32),
            weights=(nets.hidden[0].astype(np.float32), nets.out[0].astype(np.float32)),
            biases=(nets.hidden_bias[0].astype(np.float32), np.zeros(2, np.float32)),
        )
        return Trained(
            weights, self.best_loss, self.first_loss, self.generation, self.spent_s, self.samples
        )

    @property
    def _stage_name(self) -> str:
        return ("linear", "hidden")[self.stage]

    def _share(self) -> float:
        """Share of the run that is over, by generations or by the clock."""
        by_generations = self.generation / self.config.max_generations
        return min(1.0, max(by_generations, self.budget.share()))

    def _is_over(self) -> bool:
        """Whether this search has had its share, or would exceed it with another generation."""
        last = self.config.num_hidden == 0 or self.stage == 1
        share = 1.0 if last else _LINEAR_SHARE
        ahead_s = self._generation_s + self._check_s
        by_generations = self.generation / self.config.max_generations
        return by_generations >= share or not self.budget.fits(ahead_s, share)

    def _play_generation(self, writer: SummaryWriter) -> None:
        """Narrow the distribution once; at the end of a search go on to the next."""
        config, search, begin_s = self.config, self.search, time.monotonic()
        first_seed = int(self._rng.integers(1, _VALIDATION_SEED - config.num_episodes))
        episodes = self._episodes(first_seed, config.num_episodes)
        tried = search.draw(self._rng, config.num_candidates)
        found = search.update(tried, self.loss(tried, episodes), config.num_candidates // 4)
        self.generation += 1
        writer.add_scalar("search/loss", found, self.generation)
        self._generation_s = time.monotonic() - begin_s
        over = self._is_over()
        if search.generation >= self._next_check or over:
            self._next_check = search.generation + _CHECK_EVERY
            loss = self._check(search.mean)
            if loss < self.best_loss:
                self.best, self.best_loss = search.mean.copy(), loss
            writer.add_scalar("validation/loss", loss, self.generation)
            writer.add_scalar("validation/best_loss", self.best_loss, self.generation)
            self._note(loss)
        if over:
            self._next_stage()
        self._save()

    def _next_stage(self) -> None:
        config = self.config
        no_time = not self.budget.fits(self._generation_s + self._check_s)
        no_more = no_time or self.generation >= config.max_generations
        if config.num_hidden == 0 or self.stage == 1 or no_more:
            self.finished = True
            return
        self.stage, self._next_check = 1, _CHECK_EVERY
        free = np.zeros((config.num_hidden, NUM_ORDERING_FEATURES + 3))
        free[:, : NUM_ORDERING_FEATURES + 1] = self._rng.normal(
            0.0, 0.3, (config.num_hidden, NUM_ORDERING_FEATURES + 1)
        )
        # their outputs are 0 at first, so the order is still the linear one
        self.best = np.concatenate([self.best, free.ravel()])
        self.search = Search(self.best.copy(), np.full(len(self.best), 0.1))

    def _check(self, theta: FloatArray) -> float:
        """Play the validation episodes."""
        begin_s = time.monotonic()
        found = float(self.loss(theta[None], self._validation)[0])
        self._check_s = time.monotonic() - begin_s
        return found

    def _save(self) -> None:
        """Write all that the rest of the run depends on."""
        self.spent_s = self.budget.spent_s
        self.folder.save(
            f"{self.generation} generations",
            {
                "stage": self.stage,
                "generation": self.generation,
                "best": torch.from_numpy(self.best),
                "losses": [self.best_loss, self.first_loss],
                "search": self.search.state(),
                "next_check": self._next_check,
                "spent_s": self.spent_s,
                "rng": json.dumps(self._rng.bit_generator.state),
                "finished": self.finished,
            },
        )

    def _restore(self, content: dict[str, Any]) -> None:
        with restoring(self.folder.path):
            self.stage, self.generation = int(content["stage"]), int(content["generation"])
            self.best = content["best"].numpy()
            self.best_loss, self.first_loss = content["losses"]
            self.search = Search.of(content["search"])
            self._next_check = int(content["next_check"])
            self.spent_s, self.finished = float(content["spent_s"]), bool(content["finished"])
            self._rng.bit_generator.state = json.loads(content["rng"])
            self.perceptrons(self.best[None])  # of the right size

    def _note(self, loss: float) -> None:
        row = {
            "stage": self._stage_name,
            "spent_s": round(self.budget.spent_s, 1),
            "generation": self.search.generation,
            "loss": loss,
        }
        path = self.folder.path / "history.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OutputError(unwritable(path, error)) from error
        _log.info("%s", row)
