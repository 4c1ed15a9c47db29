"""In how many worlds a fleet holds, and the cheapest that holds in nearly all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from servegym.costs.uncertainty import Uncertainty, World
from servegym.plan.options import Fleet, Option
from servegym.plan.trials import Course, Trial
from servegym.scenario.fleet import in_world, uncertainty_of

#: Share of the worlds in which a fleet must hold to be called safe.
SAFE = 0.9
#: Fleets that are asked, on the way to a safe one, at most.
_MOST_ASKED = 12
#: Worlds that are looked at before it is asked whether more are needed.
_AT_ONCE = 4


class Certainty(NamedTuple):
    """In how many worlds a fleet holds.

    Attributes:
        held: Worlds in which it does.
        late_first: Worlds in which too many wait too long for their first token.
        slow: Worlds in which too many get the other tokens too slowly.
        asked: Worlds that were looked at.
    """

    held: int
    late_first: int
    slow: int
    asked: int

    @property
    def is_safe(self) -> bool:
        """Whether the fleet holds in nearly all."""
        return self.held >= SAFE * self.asked - 1e-9


class Worlds:
    """The trace in worlds in which kernels and engines are off; each is drawn once.

    Args:
        course: As predicted.
        options: Kinds of replicas.
        count: How many worlds there are.
    """

    def __init__(self, course: Course, options: Sequence[Option], count: int) -> None:
        doubts = [uncertainty_of(o.entry, o.cost, o.replica) for o in options]
        self._courses = [
            self._course(course, options, doubts, World(seed)) for seed in range(count)
        ]
        self._threads = ThreadPoolExecutor(os.cpu_count())
        self._known: dict[tuple[Fleet, str, int], Trial] = {}

    @staticmethod
    def _course(
        course: Course, options: Sequence[Option], doubts: Sequence[Uncertainty], world: World
    ) -> Course:
        pairs = zip(options, doubts, strict=True)
        types = [in_world(option.replica, doubt, world) for option, doubt in pairs]
        factor = world.ttft_factor(options[0].replica.engine)
        return replace(course, types=types, ttft_factor=factor, num_trials=0)

    @property
    def num_trials(self) -> int:
        """Simulations in all worlds."""
        return sum(course.num_trials for course in self._courses)

    def ask(self, fleet: Fleet, rule: str, *, lost_at_most: int | None = None) -> Certainty:
        """Ask in how many worlds a fleet holds; stop where more are lost than may be."""
        asked, allowed = len(self._courses), self._allowed
        trials: list[Trial] = []
        for first in range(0, asked, _AT_ONCE):
            some = range(first, min(first + _AT_ONCE, asked))
            trials += self._threads.map(lambda i: self._last_trial(fleet, rule, i), some)
            lost = sum(trial.late > allowed for trial in trials)
            if lost_at_most is not None and lost > lost_at_most:
                break
        return Certainty(
            sum(trial.late <= allowed for trial in trials),
            sum(trial.late_first > allowed for trial in trials),
            sum(trial.slow > allowed for trial in trials),
            asked,
        )

    def safe(self, fleets: Sequence[tuple[Fleet, str]]) -> tuple[Fleet, str, Certainty] | None:
        """Return the first of fleets that is safe, if one of the first dozen is."""
        may_lose = int((1.0 - SAFE) * len(self._courses) + 1e-9)
        for fleet, rule in fleets[:_MOST_ASKED]:
            found = self.ask(fleet, rule, lost_at_most=may_lose)
            if found.is_safe:
                return fleet, rule, found
        return None

    @property
    def _allowed(self) -> int:
        """Requests of the whole trace that may be late."""
        course = self._courses[0]
        return course.question.allowed_late(len(course.stretches[-1]))

    def _last_trial(self, fleet: Fleet, rule: str, i: int) -> Trial:
        """Try a fleet in a world until too many are late, or to the end."""
        key = (fleet, rule, i)
        if key not in self._known:
            course = self._courses[i]
            for stretch in range(len(course.stretches)):
                self._known[key] = course.try_all([(fleet, rule, stretch)])[0]
                if self._known[key].late > self._allowed:
                    break
        return self._known[key]
