"""Policies of a fleet in which two kinds of decisions are taken, as flat weights for a search.

Where requests are placed both decisions are linear scores. Elsewhere the dispatcher is a rule
whose numbers are searched, and beside it scores say who migrates, or what becomes of the KV of
ended turns. Each space begins at something known: weights set by hand, or rules that it contains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Protocol

import numpy as np

from servegym.baselines.migration.registry import migration
from servegym.baselines.registry import RULES
from servegym.baselines.retention.registry import retention
from servegym.errors import ConfigError
from servegym.export.fleet import FleetWeights
from servegym.export.resolve import dispatch_parts
from servegym.policy.move_scores import MoveWeights, by_freeness
from servegym.policy.placed_scores import NUM_TERMS, TERMS, PlacedWeights
from servegym.policy.turn_scores import NUM_TURN_TERMS, TURN_TERMS, TurnWeights
from servegym.scenario import Scenario
from servegym.typing import FloatArray

#: Where the search for placings begins: what is late or slow is bad, a little of either is a
#: little bad.
_DISPATCH = {"log_ttft": 0.5, "late": 4.0, "log_tpot": 0.5, "slow": 4.0, "delays": 0.5}
_PLACE = {"late": 2.0, "log_tpot": 0.5, "slow": 4.0, "kv_usage": 1.0}
_REJECTION = 0.3
#: Standard deviations with which it begins.
_SPREAD = 0.3
#: About how large the terms of turns are: the larger one is, the less its weight is spread, so that
#: all move scores by as much.
_TURN_SIZES = {"gap": 3.0, "tokens": 4.0, "waiting": 2.0}
#: The range of a rule's number that has no logarithmic one is so wide in the space.
_WIDTH = 4.0


class FleetSpace(Protocol):
    """What a search moves in."""

    #: Rules whose objective is drawn beside the search's.
    references: tuple[str, ...]
    #: Where it begins, and how far from there, `float64[size]` each.
    start: FloatArray
    spread: FloatArray

    def weights(self, theta: FloatArray) -> FleetWeights:
        """Return what some flat weights stand for, `float64[size]`."""
        ...


def fleet_space(scenario: Scenario, start: str) -> FleetSpace:
    """Return the space of a scenario's policies.

    Args:
        scenario: What is played.
        start: Rules from which the search begins, `DISPATCH+RULE`; empty: those of the space.

    Raises:
        ConfigError: If only one kind of decision is taken there, or the space does not contain
            the rules.
    """
    if scenario.spec.disaggregated:
        if start:
            raise ConfigError(
                f"start must be left out where requests are placed, got {start!r}: the search "
                "begins with weights of its own there"
            )
        return PlaceSpace()
    if scenario.spec.migrates:
        return MigrateSpace(start or "added-delay+freeness-waiting")
    if scenario.spec.tiered:
        return RetainSpace(start or "added-delay+lru")
    raise ConfigError(
        f"scenario {scenario.name} must have replicas that only prefill or decode, as pd-unequal "
        "has, requests that migrate, as near-full-kv, or tiers of KV, as agents-tiers, for "
        "--learner search: take another learner"
    )


class PlaceSpace:
    """Linear scores of dispatches and of placings, and the cost of a rejection."""

    references: tuple[str, ...] = (
        "added-delay+least-tpot",
        "class-aware+least-tpot",
        "conductor+least-tpot",
    )

    def __init__(self) -> None:
        first = self.first_guess()
        self.start = np.concatenate(list(first.arrays.values()))
        self.spread = np.full(len(self.start), _SPREAD)

    @staticmethod
    def first_guess() -> FleetWeights:
        """Return the weights with which the search begins."""
        dispatch, place = np.zeros(NUM_TERMS + 1), np.zeros(NUM_TERMS)
        for weights, given in ((dispatch, _DISPATCH), (place, _PLACE)):
            for name, value in given.items():
                weights[TERMS.index(name)] = value
        dispatch[NUM_TERMS] = _REJECTION
        return FleetWeights("placed", PlacedWeights(dispatch, place)._asdict())

    def weights(self, theta: FloatArray) -> FleetWeights:
        """See `FleetSpace.weights`."""
        dispatch, place = np.split(theta, [NUM_TERMS + 1])
        return FleetWeights("placed", PlacedWeights(dispatch, place)._asdict())


class MigrateSpace:
    """The numbers of a rule that dispatches, and scores of who moves.

    Args:
        start: `DISPATCH+freeness` or `DISPATCH+freeness-waiting`, with their parameters.
    """

    references: tuple[str, ...] = (
        "added-delay+stay",
        "llumnix+freeness",
        "added-delay+freeness-waiting",
    )

    def __init__(self, start: str) -> None:
        dispatch, *second = dispatch_parts(start)
        if len(second) != 1 or second[0].partition(":")[0] not in ("freeness", "freeness-waiting"):
            raise ConfigError(
                "start must be DISPATCH+freeness or DISPATCH+freeness-waiting where requests "
                f"migrate, got {start!r}"
            )
        self._numbers = RuleNumbers(dispatch)
        rule = migration(second[0])
        moves = by_freeness(
            rule.settings["source_below"],
            rule.settings["target_above"],
            waiting_first=rule.settings["victim"] != "shortest",
        )
        self.start = np.concatenate([self._numbers.start, *moves])
        self.spread = np.full(len(self.start), _SPREAD)

    def weights(self, theta: FloatArray) -> FleetWeights:
        """See `FleetSpace.weights`."""
        numbers, flat = np.split(theta, [len(self._numbers.start)])
        arrays = MoveWeights.of(flat)._asdict()
        return FleetWeights("migrating", arrays, self._numbers.text(numbers))


class RetainSpace:
    """The numbers of a rule that dispatches, and scores of what becomes of ended turns.

    Args:
        start: `DISPATCH+RETENTION`, the second one of `_RETENTIONS`, with their parameters.
    """

    references: tuple[str, ...] = ("prefix-load+lru", "added-delay+lru", "added-delay+ttl")

    def __init__(self, start: str) -> None:
        dispatch, *second = dispatch_parts(start)
        name, _, given = second[0].partition(":") if len(second) == 1 else ("", "", "")
        if name not in _RETENTIONS:
            raise ConfigError(
                "start must be DISPATCH+RETENTION where turns are retained, RETENTION one of "
                f"{', '.join(_RETENTIONS)}, got {start!r}"
            )
        retention(second[0])  # refuses what is no parameter
        self._numbers = RuleNumbers(dispatch)
        values = dict(part.split("=") for part in given.split(",") if part)
        turns = _RETENTIONS[name](**{key: float(value) for key, value in values.items()})
        sizes = np.array([_TURN_SIZES.get(term, 1.0) for term in TURN_TERMS])
        self.start = np.concatenate([self._numbers.start, *turns])
        self.spread = _SPREAD / np.concatenate(
            [np.ones(len(self._numbers.start)), *(sizes for _ in turns)]
        )

    def weights(self, theta: FloatArray) -> FleetWeights:
        """See `FleetSpace.weights`."""
        numbers, *turns = np.split(
            theta, len(self._numbers.start) + NUM_TURN_TERMS * np.arange(len(TurnWeights._fields))
        )
        arrays = TurnWeights(*turns)._asdict()
        return FleetWeights("kept", arrays, self._numbers.text(numbers))


def _turns(
    keep: dict[str, float], offload: dict[str, float], seconds: dict[str, float]
) -> TurnWeights:
    """Return weights of which some are given; nothing is dropped."""
    made = TurnWeights(*np.zeros((len(TurnWeights._fields), NUM_TURN_TERMS)))
    parts = zip(made, (keep, offload, {"constant": -3.0}, seconds), strict=True)
    for weights, given in parts:
        for name, value in given.items():
            weights[TURN_TERMS.index(name)] = value
    return made


def _lru() -> TurnWeights:
    return _turns({"constant": -1.0}, {"constant": 1.0}, {"gap": 1.0})


def _ttl(seconds: float = 10.0) -> TurnWeights:
    return _turns({"constant": 2.0}, {"constant": 1.0}, {"constant": math.log(max(seconds, 1e-3))})


def _lognormal(quantile: float = 0.9, most: float = 60.0) -> TurnWeights:
    z = NormalDist().inv_cdf(min(max(quantile, 1e-6), 1.0 - 1e-6))
    keep = {"constant": 1.0 + math.log(max(most, 1e-3)), "gap": -1.0, "gap_spread": -z}
    return _turns(keep, {"constant": 1.0}, {"gap": 1.0, "gap_spread": z})


def _offload_within(seconds: float = 60.0) -> TurnWeights:
    offload = {"constant": math.log(max(seconds, 1e-9)), "gap": -1.0}
    return _turns({"constant": -1.0}, offload, {"gap": 1.0})


#: Rules for ended turns that the space contains, by name: from their parameters to the weights.
_RETENTIONS: dict[str, Callable[..., TurnWeights]] = {
    "lru": _lru,
    "ttl": _ttl,
    "lognormal": _lognormal,
    "offload-within": _offload_within,
}


class RuleNumbers:
    """The tunable numbers of a dispatch rule as flat weights.

    A number whose range is logarithmic is its logarithm, another one the share of its range, times
    `_WIDTH`, and stays in the range.

    Args:
        text: The rule with its parameters, where the search begins.

    Attributes:
        start: Its numbers, `float64[n]`; none if it has nothing to tune.
    """

    def __init__(self, text: str) -> None:
        self._name = text.partition(":")[0]
        made = RULES.make(text)
        self._values = dict(zip(made.param_names, made.params.tolist(), strict=True))
        self._ranges = RULES.tunable().get(self._name, {})
        self.start = np.array(
            [
                math.log(max(self._values[key], 1e-9))
                if logarithmic
                else _WIDTH * (self._values[key] - low) / (high - low)
                for key, (low, high, logarithmic) in self._ranges.items()
            ],
            np.float64,
        )

    def text(self, numbers: FloatArray) -> str:
        """Return the rule with some numbers, `float64[n]`."""
        values = dict(self._values)
        for x, (key, (low, high, logarithmic)) in zip(
            numbers.tolist(), self._ranges.items(), strict=True
        ):
            share = min(max(x / _WIDTH, 0.0), 1.0)
            values[key] = math.exp(min(x, 20.0)) if logarithmic else low + share * (high - low)
        given = ",".join(f"{key}={value:.9g}" for key, value in values.items())
        return f"{self._name}:{given}" if given else self._name
