"""The search for the cheapest fleet that keeps the limits.

A fleet is tried on the busiest sixteenth of the trace, then on the busiest quarter, then on all of
it, always on the same requests. It is dropped as soon as more requests were late than may be late
in the whole trace: a stretch begins with an empty fleet and nothing follows it, so that the same
requests fare no better in the whole. From stretch to stretch half of the rules goes on.

Fleets of one kind are searched by bisection. A fleet of two kinds is interesting only where it is
cheaper than the best of one: of those, where the first stretch is kept with the fewest replicas is
a flight of stairs, from which the search climbs, the cheapest fleet first, until one keeps all.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from servegym.plan.options import Fleet, Option, usd_per_h
from servegym.plan.trials import Course, Trial
from servegym.typing import BoolArray

#: Rules that are tried on the whole trace.
_LAST_RULES = 2


class Verdict(NamedTuple):
    """What the search found out about a fleet.

    Attributes:
        holds: Whether it keeps the limits.
        trial: Under its best rule, on the last stretch that it was tried on.
    """

    holds: bool
    trial: Trial


@dataclass
class Search:
    """One search; what it finds out is kept.

    Attributes:
        course: What fleets are tried on.
        options: Kinds of replicas.
        progress: Called after every fleet.
        verdicts: By fleet, of those that went all the way until they were dropped.
    """

    course: Course
    options: Sequence[Option]
    progress: Callable[[], None] = lambda: None
    verdicts: dict[Fleet, Verdict] = field(default_factory=dict)
    _first: dict[Fleet, list[Trial]] = field(default_factory=dict)
    _late: dict[int, BoolArray] = field(default_factory=dict)

    def cost(self, fleet: Fleet) -> float:
        """Rent, dollars an hour."""
        return usd_per_h(fleet, self.options)

    def of(self, *counts: tuple[int, int]) -> Fleet:
        """Make a fleet of `(option, count)`."""
        chosen = dict(counts)
        return tuple(chosen.get(i, 0) for i in range(len(self.options)))

    def largest(self, option: int) -> int:
        """Most replicas of an option that a fleet of it alone may have."""
        question = self.course.question
        if question.max_usd_per_h is None:
            return question.max_replicas
        affordable = math.floor(question.max_usd_per_h / self.options[option].usd_per_h + 1e-9)
        return min(question.max_replicas, affordable)

    def judge(self, fleet: Fleet) -> Verdict:
        """Try a fleet on stretch after stretch, until it is dropped or has kept them all."""
        if fleet not in self.verdicts:
            self.verdicts[fleet] = self._judge(fleet)
            self.progress()
        return self.verdicts[fleet]

    def _judge(self, fleet: Fleet) -> Verdict:
        last = len(self.course.stretches) - 1
        trials = self._first_stretch(fleet)
        for stretch in range(last + 1):
            if stretch:
                half = max(math.ceil(len(trials) / 2), _LAST_RULES)
                jobs = [(fleet, trial.rule, stretch) for trial in trials[:half]]
                trials = self._ranked(self.course.try_all(jobs))
            if not self._bearable(trials[0]):
                return Verdict(False, trials[0])
        return Verdict(True, trials[0])

    def survives(self, fleet: Fleet) -> bool:
        """Whether a fleet is not dropped on the first stretch."""
        return self._bearable(self._first_stretch(fleet)[0])

    def _first_stretch(self, fleet: Fleet) -> list[Trial]:
        if fleet not in self._first:
            jobs = [(fleet, rule, 0) for rule in self.course.question.rules]
            self._first[fleet] = self._ranked(self.course.try_all(jobs))
        return self._first[fleet]

    def _ranked(self, trials: list[Trial]) -> list[Trial]:
        """Order by requests late, then by how much room is left; equals stay in order."""
        return sorted(trials, key=lambda trial: (trial.late, trial.pressure))

    def _bearable(self, trial: Trial) -> bool:
        return self._few(trial.late)

    def _few(self, late: int) -> bool:
        """Whether the whole trace may have so many requests that are late."""
        return late <= self.course.question.allowed_late(len(self.course.stretches[-1]))

    def alone(self, option: int) -> Fleet | None:
        """Find the smallest number of replicas of one kind that hold, if any number does."""
        most, low, high = self.largest(option), 0, 1
        while high < most and not self.judge(self.of((option, high))).holds:
            low, high = high, min(2 * high, most)
        if most < 1 or not self.judge(self.of((option, high))).holds:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self.judge(self.of((option, middle))).holds:
                high = middle
            else:
                low = middle
        return self.of((option, high))

    def mixed(self, below_usd_per_h: float | None) -> Fleet | None:
        """Find the cheapest fleet of two kinds that holds and, if a rent is given, costs less."""
        most, budget = self.course.question.max_replicas, self.course.question.max_usd_per_h

        def may(fleet: Fleet) -> bool:
            cost = self.cost(fleet)
            affordable = budget is None or cost <= budget
            cheaper = below_usd_per_h is None or cost < below_usd_per_h
            return affordable and cheaper and sum(fleet) <= most

        heap: list[tuple[float, Fleet]] = []
        for pair in itertools.combinations(range(len(self.options)), 2):
            if self._hopeless(*pair):
                continue
            for fleet in self._stairs(*pair, may):
                heapq.heappush(heap, (self.cost(fleet), fleet))
        seen = {fleet for _, fleet in heap}
        while heap:
            _, fleet = heapq.heappop(heap)
            if self.judge(fleet).holds:
                return fleet
            for i, count in enumerate(fleet):
                larger = (*fleet[:i], count + 1, *fleet[i + 1 :])
                if count and larger not in seen and may(larger):
                    seen.add(larger)
                    heapq.heappush(heap, (self.cost(larger), larger))
        return None

    def _hopeless(self, a: int, b: int) -> bool:
        """Whether too many requests are late on as many of either kind as there may be."""
        late = [self._always_late(i) for i in (a, b)]
        return not self._few(int((late[0] & late[1]).sum()))

    def _always_late(self, option: int) -> BoolArray:
        """Which requests are late on the most replicas of a kind; nobody where fewer hold."""
        if option not in self._late:
            most = self.largest(option)
            nobody = np.zeros(len(self.course.stretches[-1]), bool)
            fleet = self.of((option, most))
            lost = most and not self.judge(fleet).holds
            rule = self.judge(fleet).trial.rule if lost else ""
            self._late[option] = self.course.late(fleet, rule) if lost else nobody
        return self._late[option]

    def _stairs(self, a: int, b: int, may: Callable[[Fleet], bool]) -> Iterator[Fleet]:
        """Of each number of replicas b the fewest replicas a that survive the first stretch."""
        num_a = 1
        while may(self.of((a, num_a + 1), (b, 1))):
            num_a += 1
        num_b = 1
        while num_a >= 1 and may(self.of((a, 1), (b, num_b))):
            while not may(self.of((a, num_a), (b, num_b))):
                num_a -= 1
            fewest = None
            while num_a >= 1 and self.survives(self.of((a, num_a), (b, num_b))):
                fewest = self.of((a, num_a), (b, num_b))
                num_a -= 1
            if fewest is not None:
                self.progress()
                yield fewest
            num_b += 1
