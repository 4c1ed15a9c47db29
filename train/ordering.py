"""Training an order inside an engine: a search over the weights of a perceptron.

First a score that is linear in the logarithms of a request's features, some twenty numbers: it can
be any product of powers, of which shortest remaining first is one. Then hidden units beside it. All
candidates of a generation play the same episodes, in compiled code, so what arrivals do cancels.
What is kept is what is best on validation episodes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from servegym.baselines.ordering.registry import ordering_policy
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError
from servegym.policy.learned_ordering import OrderingWeights
from servegym.policy.ordering import NUM_ORDERING_FEATURES, OrderingFeature, OrderingPolicy
from servegym.policy.play_perceptron import Perceptrons, play_perceptrons
from servegym.policy.run_ordering import make_simulator, run_ordering
from servegym.scenario import Scenario, load_scenario
from servegym.train.workflow_search import Search
from servegym.typing import FloatArray

_log = logging.getLogger(__name__)

#: The request's own features; the engine's are the same in all rows and change no linear order.
_OWN = range(int(OrderingFeature["COMPUTED_TOKENS"]), int(OrderingFeature["NUM_RUNNING"]))
#: Validation episodes' seeds count from here; those that are held out begin at 1,000,000.
_VALIDATION_SEED = 500_000
#: Rows that say how features are distributed.
_NUM_SAMPLES = 20_000


@dataclass(frozen=True)
class OrderingTraining:
    """Settings of a run.

    Attributes:
        scenario: Bundled name or YAML file, of one engine that goes by priorities.
        load: Range of the load factor, drawn per episode.
        max_minutes: Wall-clock time, shared by both searches.
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
    num_hidden: int = 8
    num_candidates: int = 48
    num_episodes: int = 12
    num_validation: int = 32
    num_requests: int | None = None
    num_threads: int = 2
    seed: int = 0


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
        folder: Where config.json and history.jsonl go.
    """

    def __init__(self, config: OrderingTraining, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.scenario = load_scenario(config.scenario)
        if not self.scenario.orders_requests:
            raise ConfigError(
                f"scenario {self.scenario.name} must have a fleet of one replica with "
                "engine: vllm-priority to train an order on it"
            )
        if not 0 < config.load[0] <= config.load[1]:
            raise ConfigError(f"load must go from low to high, above 0, got {config.load}")
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
        self._begin_s = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"kind": "ordering", **asdict(config)}, indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

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
        theta[:, self._linear.index(int(OrderingFeature["PREDICTED_REMAINING_TOKENS"]))] = 1.0
        return theta.ravel()

    def run(self, progress: Callable[[str, float], None] = lambda text, share: None) -> Trained:
        """Search, and return the best on validation episodes.

        Args:
            progress: Called with what is done and the share of the time.
        """
        config = self.config
        best = self._first_guess()
        best_loss = base_loss = float(self.loss(best[None], self._validation)[0])
        _log.info("srpt: validation loss %.4f", base_loss)
        share = 1.0 if config.num_hidden == 0 else 0.4
        search = Search(best.copy(), np.full(len(best), 0.3))
        best, best_loss = self._search(search, best, best_loss, share, "linear", progress)
        generations = search.generation
        if config.num_hidden:
            free = np.zeros((config.num_hidden, NUM_ORDERING_FEATURES + 3))
            free[:, : NUM_ORDERING_FEATURES + 1] = self._rng.normal(
                0.0, 0.3, (config.num_hidden, NUM_ORDERING_FEATURES + 1)
            )
            # their outputs are 0 at first, so the order is still the linear one
            wide = np.concatenate([best, free.ravel()])
            search = Search(wide.copy(), np.full(len(wide), 0.1))
            best, best_loss = self._search(search, wide, best_loss, 1.0, "hidden", progress)
            generations += search.generation
        nets = self.perceptrons(best[None])
        weights = OrderingWeights(
            mean=nets.mean.astype(np.float32),
            scale=nets.scale.astype(np.float32),
            weights=(nets.hidden[0].astype(np.float32), nets.out[0].astype(np.float32)),
            biases=(nets.hidden_bias[0].astype(np.float32), np.zeros(2, np.float32)),
        )
        spent_s = time.monotonic() - self._begin_s
        return Trained(weights, best_loss, base_loss, generations, spent_s, self.samples)

    def _search(
        self,
        search: Search,
        best: FloatArray,
        best_loss: float,
        until_share: float,
        stage: str,
        progress: Callable[[str, float], None],
    ) -> tuple[FloatArray, float]:
        """Narrow a distribution until a share of the time is over; return the best mean."""
        config = self.config
        next_check = 5
        while True:
            first_seed = int(self._rng.integers(1, _VALIDATION_SEED - config.num_episodes))
            episodes = self._episodes(first_seed, config.num_episodes)
            tried = search.draw(self._rng, config.num_candidates)
            search.update(tried, self.loss(tried, episodes), config.num_candidates // 4)
            spent = (time.monotonic() - self._begin_s) / (60.0 * config.max_minutes)
            over = spent >= until_share
            if search.generation >= next_check or over:
                next_check = search.generation + 5
                found = float(self.loss(search.mean[None], self._validation)[0])
                self._note(stage, search.generation, found)
                if found < best_loss:
                    best, best_loss = search.mean.copy(), found
            progress(f"{stage}, best validation loss {best_loss:.4f}", min(spent, 1.0))
            if over:
                return best, best_loss

    def _note(self, stage: str, generation: int, loss: float) -> None:
        spent_s = round(time.monotonic() - self._begin_s, 1)
        row = {"stage": stage, "spent_s": spent_s, "generation": generation, "loss": loss}
        with (self.folder / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        _log.info("%s", row)
