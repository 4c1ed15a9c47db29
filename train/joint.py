"""Training a fleet as a whole: who goes where, and who is admitted and preempted there.

The dispatcher and the schedulers, which share their weights, are searched in turns, each against
what the other is at present. Whole episodes judge, so that what shows minutes later counts as well:
a dispatcher may come to rely on how the engines order what it sends them, and they on it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from servegym.agents.network import DispatchNetwork
from servegym.agents.torch_policy import TorchPolicy
from servegym.baselines.ordering.registry import ordering_policy
from servegym.baselines.registry import policy
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.errors import ConfigError
from servegym.export.from_torch import export_policy
from servegym.export.ordering import save_ordering
from servegym.export.resolve import dispatch_parts, resolve_dispatch
from servegym.policy.learned_ordering import MlpOrdering, OrderingWeights
from servegym.policy.ordering import PREDICTED_REMAINING_TOKENS, PROMPT_TOKENS
from servegym.policy.pair import Pair
from servegym.policy.play_fleet import play_fleets
from servegym.policy.policy import Heuristic
from servegym.policy.run_pair import make_simulator, run_pair
from servegym.scenario import Scenario
from servegym.train.dispatch_space import CONTAINED_DISPATCHES, DispatchSpace, Observer
from servegym.train.joint_settings import JointTraining
from servegym.train.order_space import CONTAINED_ORDERS, OrderSpace, Sampler
from servegym.train.request_run import losses
from servegym.train.run_folder import StoredRun
from servegym.train.search import Search
from servegym.train.search_run import SearchRun
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import Float32Array, FloatArray

#: Who takes turns: places in lists of weights and searches.
SCHEDULERS, DISPATCHER = range(2)
#: Who plays while the first samples are taken.
_FIRST = "added-delay+footprint"
#: Standard deviations of weights at first: around what is near to rules; around what is good.
_WIDE, _NARROW = 0.3, 0.1
#: Exponents of the prompt with which it may begin, of waiting requests and of running ones.
_POWERS = ((1.0, 1.0), (0.0, 0.0), (1.0, -1.5), (3.0, 0.5))
#: Episodes that samples are taken from.
_NUM_SAMPLED = 4


def require_contained(start: str, scenario: Scenario) -> None:
    """Check that the search contains a pair, choice for choice.

    Args:
        start: `DISPATCH+ORDER`, with their parameters.
        scenario: What is played.

    Raises:
        ConfigError: If it does not.
    """
    dispatch, *order = dispatch_parts(start)
    names = [part.partition(":")[0] for part in (dispatch, *order)]
    if len(names) != 2 or names[0] not in CONTAINED_DISPATCHES or names[1] not in CONTAINED_ORDERS:
        raise ConfigError(
            "start must be DISPATCH+ORDER of rules that the search contains, DISPATCH one of "
            f"{', '.join(CONTAINED_DISPATCHES)}, ORDER one of {', '.join(CONTAINED_ORDERS)}, got "
            f"{start!r}"
        )
    policy(dispatch), ordering_policy(order[0])  # refuse what is no parameter
    slots = {replica.max_num_seqs for replica in scenario.spec.types}
    if names[0] == "min-kv" and len(slots) > 1:
        raise ConfigError(
            "start min-kv is for engines of the same max_num_seqs: among equals it goes by counts, "
            f"the search by shares of them; got {', '.join(map(str, sorted(slots)))}"
        )


class TrainedPair(NamedTuple):
    """What a run found.

    Attributes:
        network: The dispatcher.
        weights: The order of all engines.
        loss: Mean loss on the validation episodes, see `losses`.
        first_loss: That of where the search began.
    """

    network: DispatchNetwork
    weights: OrderingWeights
    loss: float
    first_loss: float


class JointTrainer(SearchRun[JointTraining, TrainedPair]):
    """A run that searches a dispatcher and an order for all engines behind it."""

    problem = "dispatch"
    settings = JointTraining
    references = ("least-outstanding+fcfs", "least-outstanding+footprint")

    def __init__(self, config: JointTraining, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        pair = resolve_dispatch(config.start or _FIRST)
        assert isinstance(pair, Pair)
        (replicas, request, _), self.rows = self._sample(pair, self._rng)
        self.order_space = OrderSpace(self.rows, powers=bool(config.start))
        self.dispatch_space = DispatchSpace(replicas, request, self._num_extra)
        if config.start:
            self._begin(*self._start(), _NARROW)
        else:
            self._begin(self._orders()[0], self.dispatch_space.guesses()[0], _WIDE)

    @staticmethod
    def completed(config: JointTraining, scenario: Scenario) -> JointTraining:
        """Refuse scenarios in which there is nothing to decide together."""
        if not scenario.orders_fleet:
            raise ConfigError(
                f"scenario {scenario.name} must have two replicas or more, all with engine: "
                "vllm-priority, to train dispatch and order together"
            )
        if config.start:
            require_contained(config.start, scenario)
        return config

    @property
    def _num_extra(self) -> int:
        actions = self.scenario.actions
        return int(actions.hold) + int(actions.reject)

    @override
    def _validation_episodes(self) -> list[Episode]:
        return self.episodes(FIRST_SEED, self.config.num_validation, None)

    def _sample(
        self, pair: Pair, rng: np.random.Generator
    ) -> tuple[tuple[Float32Array, Float32Array, Float32Array], FloatArray]:
        """Play some episodes; return observations of dispatches and rows of requests."""
        observer = Observer(pair.dispatch, self._num_extra)
        sampler = Sampler(pair.order, rng)
        episodes = self.episodes(FIRST_SEED, _NUM_SAMPLED, self.config.num_requests)
        watched = Pair(observer, sampler, pair.name)
        run_pair(make_simulator(self.scenario.spec, episodes, watched), watched)
        where = f"{self.scenario.name} at load {self.config.load}"
        return observer.samples(), sampler.samples(where)

    def _begin(self, order: FloatArray, dispatch: FloatArray, spread: float) -> None:
        """Make the searches anew, around some weights."""
        self.searches = [
            Search(start.copy(), np.full(len(start), spread)) for start in (order, dispatch)
        ]

    def _start(self) -> tuple[FloatArray, FloatArray]:
        """Return the weights of the pair from which to begin: order, dispatcher."""
        dispatch, order = dispatch_parts(self.config.start)
        slots, rule = self.scenario.spec.types[0].max_num_seqs, policy(dispatch)
        assert isinstance(rule, Heuristic)
        return (
            self.order_space.like(ordering_policy(order)),
            self.dispatch_space.like(rule, slots),
        )

    def _orders(self) -> list[FloatArray]:
        """Return orders from which the search may begin: tokens left times powers of the prompt.

        Near to `footprint`, with which they share the exponents; shortest remaining first is one.
        """
        scale, space = self.order_space.scale, self.order_space
        left, prompt = scale[PREDICTED_REMAINING_TOKENS], scale[PROMPT_TOKENS]
        return [
            space.guess(
                *(
                    {PREDICTED_REMAINING_TOKENS: left, PROMPT_TOKENS: power * prompt}
                    for power in powers
                )
            )
            for powers in _POWERS
        ]

    def _play(self, thetas: list[FloatArray], episodes: list[Episode]) -> Simulator:
        """Play the same episodes under each of some weights, of both, `float64[C, size]`."""
        return play_fleets(
            self.scenario.spec,
            episodes,
            self.dispatch_space.dispatchers(thetas[DISPATCHER]),
            self.order_space.orders(thetas[SCHEDULERS]),
            self.config.num_threads,
        )

    def validate(self) -> Validated:
        """Play the validation episodes under the means of both searches."""
        means = [search.mean[None] for search in self.searches]
        return self.validated_by(self._play(means, self._validation))

    @override
    def validate_rule(self, name: str) -> Validated:
        pair = resolve_dispatch(name)
        assert isinstance(pair, Pair)
        simulator = make_simulator(self.scenario.spec, self._validation, pair)
        run_pair(simulator, pair)
        return self.validated_by(simulator)

    def open_stage(self) -> None:
        """Begin where it is best to, then put hidden units beside both linear scores."""
        if self.stage == 0 and self.config.start:
            return  # it has begun there
        if self.stage == 0:
            orders, dispatches = self._orders(), self.dispatch_space.guesses()
            pairs = list(itertools.product(orders, dispatches))
            thetas = [np.array(part) for part in zip(*pairs, strict=True)]
            least = int(self._loss(thetas).argmin())
            self._begin(*pairs[least], _WIDE)
            return
        order, dispatch = (best.numpy() for best in self.best)
        count = self.config.num_hidden
        order = self.order_space.with_units(order, count, self._rng)
        dispatch = self.dispatch_space.with_units(dispatch, count, self._rng)
        self.best = [torch.from_numpy(order), torch.from_numpy(dispatch)]
        self._begin(order, dispatch, _NARROW)

    def _loss(self, thetas: list[FloatArray]) -> FloatArray:
        """Return the mean loss of each of some weights of both on new episodes, `float64[C]`."""
        config = self.config
        episodes = self.episodes(self.draw_first_seed(), config.num_episodes, config.num_requests)
        found: FloatArray = losses(self.scenario, self._play(thetas, episodes))
        return found.reshape(-1, len(episodes)).mean(1)

    def improve(self) -> dict[str, float]:
        """Narrow one of the distributions once, against the mean of the other."""
        turn, count = self.generation % 2, self.config.num_candidates
        tried = self.searches[turn].draw(self._rng, count)
        thetas = [np.tile(search.mean, (count, 1)) for search in self.searches]
        thetas[turn] = tried
        found = self.searches[turn].update(tried, self._loss(thetas), max(1, count // 4))
        spread = np.concatenate([search.spread for search in self.searches])
        return {"rollout/return": -found, "train/spread": float(spread.mean())}

    @override
    def parameters(self) -> list[Tensor]:
        return [torch.from_numpy(search.mean.copy()) for search in self.searches]

    @override
    def take_best(self) -> None:
        self.order_space.perceptrons(self.best[SCHEDULERS].numpy()[None])  # of the right size
        self.dispatch_space.dispatchers(self.best[DISPATCHER].numpy()[None])

    @override
    def found(self) -> TrainedPair:
        return TrainedPair(
            self.dispatch_space.network(self.best[DISPATCHER].numpy()),
            self.order_space.weights(self.best[SCHEDULERS].numpy()),
            float(self.best_scores.mean()),
            float(self.first_scores.mean()),
        )

    def export(self, folder: Path | None = None) -> Path:
        """Write the router's part and that of the engines' plug-in; return their folder."""
        found, folder = self.found(), folder or self.folder.path
        order = MlpOrdering(found.weights, information="predictive", name="order")
        pair = Pair(TorchPolicy(found.network), order, name="pair")
        observations, rows = self._sample(pair, np.random.default_rng(self.config.seed))
        training: dict[str, float | int | str] = {
            "algorithm": "cross-entropy search",
            "generations": self.generation,
            "minutes": round(self.spent_s / 60.0, 2),
            "seed": self.config.seed,
            "validation_loss": round(found.loss, 5),
            "validation_loss_first": round(found.first_loss, 5),
        }
        export_policy(
            found.network,
            folder / "policy",
            observations,
            scenario=self.config.scenario,
            objective=self.scenario.objective,
            training=training,
        )
        scenario = self.config.scenario
        save_ordering(found.weights, folder, rows, scenario=scenario, training=training)
        return folder

    @override
    def state(self) -> dict[str, Any]:
        return {
            "searches": [search.state() for search in self.searches],
            "rng": json.dumps(self._rng.bit_generator.state),
        }

    @override
    def restore(self, content: Mapping[str, Any]) -> None:
        self.searches = [Search.of(state) for state in content["searches"]]
        self._rng.bit_generator.state = json.loads(content["rng"])
        self.take_best()
