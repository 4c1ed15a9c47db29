"""What all runs have in common that train a dispatcher and the order of all engines behind it."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
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
from servegym.policy.pair import Pair
from servegym.policy.play_fleet import play_fleets
from servegym.policy.policy import Heuristic
from servegym.policy.run_pair import make_simulator, run_pair
from servegym.scenario import Scenario
from servegym.train.dispatch_space import CONTAINED_DISPATCHES, DispatchSpace, Observer
from servegym.train.order_space import CONTAINED_ORDERS, OrderSpace, Sampler
from servegym.train.request_run import RequestRun, RequestSettings
from servegym.train.run_folder import StoredRun
from servegym.train.validation import FIRST_SEED, Validated
from servegym.typing import Float32Array, FloatArray

#: Places in lists of weights, of both.
SCHEDULERS, DISPATCHER = range(2)
#: Who plays while the first samples are taken.
_FIRST = "added-delay+footprint"
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


class PairSettings(RequestSettings, Protocol):
    """What the settings of all of them have."""

    @property
    def start(self) -> str:
        """Pair from which to begin, `DISPATCH+ORDER`; empty: the run's own."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests of each episode."""
        ...

    @property
    def num_validation(self) -> int:
        """Episodes by which the best is chosen, as long as the scenario's own."""
        ...

    @property
    def num_threads(self) -> int:
        """Threads that share the work."""
        ...


C = TypeVar("C", bound=PairSettings)


class PairRun(RequestRun[C, TrainedPair]):
    """A run that trains a dispatcher and an order, both as flat weights.

    Attributes:
        rows: Rows of requests' features that normalise the order's inputs.
        order_space: From flat weights to orders; with a start they have powers, too.
        dispatch_space: From flat weights to dispatchers.
    """

    problem = "dispatch"
    references = ("least-outstanding+fcfs", "least-outstanding+footprint")

    def __init__(self, config: C, folder: Path | StoredRun) -> None:
        super().__init__(config, folder)
        pair = resolve_dispatch(config.start or _FIRST)
        assert isinstance(pair, Pair)
        (replicas, request, _), self.rows = self._sample(pair, self._rng)
        self.order_space = OrderSpace(self.rows, powers=bool(config.start))
        self.dispatch_space = DispatchSpace(replicas, request, self._num_extra)

    @property
    @abstractmethod
    def described(self) -> dict[str, float | int | str]:
        """How it was trained, for the manifest."""

    @staticmethod
    def completed(config: C, scenario: Scenario) -> C:
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

    def _start(self) -> tuple[FloatArray, FloatArray]:
        """Return the weights of the pair from which to begin: order, dispatcher."""
        dispatch, order = dispatch_parts(self.config.start)
        slots, rule = self.scenario.spec.types[0].max_num_seqs, policy(dispatch)
        assert isinstance(rule, Heuristic)
        return (
            self.order_space.like(ordering_policy(order)),
            self.dispatch_space.like(rule, slots),
        )

    def _play(self, thetas: list[FloatArray], episodes: list[Episode]) -> Simulator:
        """Play the same episodes under each of some weights, of both, `float64[C, size]`."""
        return play_fleets(
            self.scenario.spec,
            episodes,
            self.dispatch_space.dispatchers(thetas[DISPATCHER]),
            self.order_space.orders(thetas[SCHEDULERS]),
            self.config.num_threads,
        )

    @override
    def validate_rule(self, name: str) -> Validated:
        pair = resolve_dispatch(name)
        assert isinstance(pair, Pair)
        simulator = make_simulator(self.scenario.spec, self._validation, pair)
        run_pair(simulator, pair)
        return self.validated_by(simulator)

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
            **self.described,
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
