"""Genetic search for closed-form scores: tournaments, crossover, mutation, and a price on size.

All candidates of a generation play the same episodes. A candidate that lives on is judged by the
mean of all its generations, each compared with one reference on the same episodes: luck wears off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from servegym.policy.expression import (
    FIELDS,
    FUNCTIONS,
    MAX_DEPTH,
    NUMBER,
    OPERATORS,
    Expression,
    number,
    parse,
)

#: How children are made, and how often.
_CROSSOVER, _CONSTANTS, _SUBTREE, _WEIGHT, _REPLACE, _HOIST = range(6)
_KINDS = (0.3, 0.3, 0.12, 0.1, 0.1, 0.08)
#: Levels of a subtree that is drawn, how often it ends early, and how often a leaf is a number.
_LEVELS, _EARLY, _NUMBERS = 3, 0.3, 0.3
#: Standard deviations of the logarithm by which numbers change, from fine to coarse.
_STEPS = (0.1, 0.4, 1.5)
_TOURNAMENT, _MOST_TRIES = 4, 20
#: Generations after which a candidate's mean is trusted.
_PROVEN = 3


class Proportions(NamedTuple):
    """Of a generation.

    Attributes:
        size: Candidates.
        max_parts: Of each, at most.
        price: On each part, in the unit of losses.
    """

    size: int
    max_parts: int
    price: float


@dataclass
class Candidate:
    """A score, and how it did.

    Attributes:
        expression: The score.
        total: Sum over its generations of its loss less that of the reference.
        age: How many generations it has played.
    """

    expression: Expression
    total: float = 0.0
    age: int = 0

    @property
    def loss(self) -> float:
        """Mean loss less that of the reference."""
        return self.total / self.age if self.age else np.inf


class Evolution:
    """A population of scores.

    Args:
        starts: Where it begins: all of these, and mutants of them.
        proportions: Of a generation.

    Attributes:
        population: The candidates; after a generation, the best first.
    """

    def __init__(self, starts: Sequence[Expression], proportions: Proportions) -> None:
        self._proportions = proportions
        self.population = [Candidate(x) for x in starts]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {
            "scores": [str(x.expression) for x in self.population],
            "totals": [x.total for x in self.population],
            "ages": [x.age for x in self.population],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` has returned."""
        columns = (state["scores"], state["totals"], state["ages"])
        self.population = [
            Candidate(parse(text), float(total), int(age))
            for text, total, age in zip(*columns, strict=True)
        ]

    @property
    def best(self) -> Candidate:
        """The best candidate whose mean can be trusted, else the best of all."""
        proven = [x for x in self.population if x.age >= _PROVEN]
        return min(proven or self.population, key=self._priced)

    def step(self, loss: Callable[[Expression], float], rng: np.random.Generator) -> None:
        """Make children, play a generation and keep the better half of it.

        Args:
            loss: Of a score on this generation's episodes, less that of the reference; lower is
                better.
            rng: Randomness.
        """
        self._fill(rng)
        for candidate in self.population:
            candidate.total += loss(candidate.expression)
            candidate.age += 1
        self.population.sort(key=self._priced)
        del self.population[self._proportions.size // 2 :]

    def _priced(self, candidate: Candidate) -> float:
        return candidate.loss + self._proportions.price * candidate.expression.size

    def _fill(self, rng: np.random.Generator) -> None:
        """Add children until the generation is whole; no two candidates are the same."""
        parents = list(self.population)
        known = {str(x.expression) for x in parents}
        while len(self.population) < self._proportions.size:
            for _ in range(_MOST_TRIES):
                child = self._child(parents, rng)
                fits = child.size <= self._proportions.max_parts and child.depth <= MAX_DEPTH
                if fits and child.fields() and str(child) not in known:
                    break
            else:
                child = drawn(rng)
            known.add(str(child))
            self.population.append(Candidate(child))

    def _child(self, parents: Sequence[Candidate], rng: np.random.Generator) -> Expression:
        own = self._parent(parents, rng)
        kind = int(rng.choice(len(_KINDS), p=_KINDS))
        if kind == _CONSTANTS:
            return with_other_numbers(own, rng)
        places = places_of(own)
        place = places[rng.integers(len(places))]
        there = part_at(own, place)
        if kind == _CROSSOVER:
            other = self._parent(parents, rng)
            others = places_of(other)
            return with_part(own, place, part_at(other, others[rng.integers(len(others))]))
        if kind == _SUBTREE:
            return with_part(own, place, drawn(rng))
        if kind == _WEIGHT:
            weight = number(_rounded(float(np.exp(rng.normal(0.0, 0.7)))))
            return with_part(own, place, Expression("*", (there, weight)))
        if kind == _REPLACE:
            return with_part(own, place, _with_other_name(there, rng))
        return there  # hoist: a part alone

    def _parent(self, parents: Sequence[Candidate], rng: np.random.Generator) -> Expression:
        """Return the best of some: the population is sorted, but for the first generation."""
        return parents[int(rng.integers(len(parents), size=_TOURNAMENT).min())].expression


Place = tuple[int, ...]


def places_of(expression: Expression) -> list[Place]:
    """Return where its parts are: which part of which part, from the whole on."""
    found: list[Place] = [()]
    for i, part in enumerate(expression.parts):
        found += [(i, *place) for place in places_of(part)]
    return found


def part_at(expression: Expression, place: Place) -> Expression:
    """Return the part at a place."""
    for i in place:
        expression = expression.parts[i]
    return expression


def with_part(expression: Expression, place: Place, part: Expression) -> Expression:
    """Return an expression with another part at a place."""
    if not place:
        return part
    i, *rest = place
    parts = list(expression.parts)
    parts[i] = with_part(parts[i], tuple(rest), part)
    return expression._replace(parts=tuple(parts))


def with_other_numbers(expression: Expression, rng: np.random.Generator) -> Expression:
    """Return an expression with some of its numbers changed, at least one if it has any."""
    numbers = [x for x in places_of(expression) if part_at(expression, x).name == NUMBER]
    if not numbers:
        return expression
    step = _STEPS[rng.integers(len(_STEPS))]
    chosen = rng.random(len(numbers)) < 0.3
    chosen[rng.integers(len(numbers))] = True
    for place, change in zip(numbers, chosen, strict=True):
        if change:
            value = part_at(expression, place).value
            value = _rounded((value or 0.01) * float(np.exp(rng.normal(0.0, step))))
            expression = with_part(expression, place, number(value))
    return expression


def drawn(rng: np.random.Generator, levels: int = _LEVELS) -> Expression:
    """Draw an expression of at most so many levels."""
    if levels <= 1 or rng.random() < _EARLY:
        if rng.random() < _NUMBERS:
            return number(_rounded(float(10.0 ** rng.uniform(-3.0, 2.0))))
        return Expression(FIELDS[rng.integers(len(FIELDS))])
    names = [*OPERATORS, *FUNCTIONS]
    name = names[rng.integers(len(names))]
    parts = tuple(drawn(rng, levels - 1) for _ in range(FUNCTIONS.get(name, 2)))
    if name == "negative" and parts[0].name == NUMBER:
        return parts[0]
    return Expression(name, parts)


def _with_other_name(expression: Expression, rng: np.random.Generator) -> Expression:
    """Return an expression with another feature, operator or function of as many arguments."""
    arity = len(expression.parts)
    if arity == 0:
        return drawn(rng, levels=1)
    names = [x for x in (*OPERATORS, *FUNCTIONS) if FUNCTIONS.get(x, 2) == arity]
    return expression._replace(name=names[rng.integers(len(names))])


def _rounded(value: float) -> float:
    """Four digits say enough, and texts stay short; numbers stay within bounds."""
    return float(f"{min(max(value, 1e-9), 1e9):.4g}")
