"""The answer to a question: the cheapest fleet, and what became of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from servegym.errors import ConfigError
from servegym.plan.certainty import Certainty, Worlds
from servegym.plan.options import Fleet, LeftOut, Option, find_options, fleet_text, usd_per_h
from servegym.plan.prices import Price
from servegym.plan.question import Question
from servegym.plan.search import Search
from servegym.plan.trials import Course, Trial
from servegym.workloads.table import RequestTable

#: Counts of one kind of replica, and fleets of two kinds, that the picture shows beside the search.
_SHOWN_COUNTS, _SHOWN_MIXED = 6, 16
#: Other fleets that are asked in other worlds, and replicas that are added to find a safe one.
_ASKED, _MORE = 3, 4


@dataclass(frozen=True)
class Candidate:
    """A fleet on the whole trace.

    Attributes:
        trial: What became of the trace.
        name: Of the fleet.
        usd_per_h: Its rent.
        why: Why it is not the answer; empty: it is.
        certainty: In how many worlds it holds, if that was asked.
    """

    trial: Trial
    name: str
    usd_per_h: float
    why: str = ""
    certainty: Certainty | None = None


@dataclass(frozen=True)
class Answer:
    """What a search ended with.

    Attributes:
        question: What was asked.
        prices: By GPU.
        options: Kinds of replicas, the cheapest first.
        left_out: Kinds that cannot serve the model.
        num_requests: Of the trace.
        best: The cheapest fleet that holds; None if none does.
        safe: The cheapest found that holds in nine of ten worlds; None if that was not asked, or
            none was found.
        others: The next best and those that just fail, the cheapest first.
        shown: All fleets that were tried on the whole trace, for the picture.
        num_trials: Simulations.
        seconds: That parts of the search took.
    """

    question: Question
    prices: Mapping[str, Price]
    options: Sequence[Option]
    left_out: Sequence[LeftOut]
    num_requests: int
    best: Candidate | None
    safe: Candidate | None
    others: Sequence[Candidate]
    shown: Sequence[Candidate]
    num_trials: int
    seconds: Mapping[str, float] = field(compare=False)

    @property
    def frontier(self) -> list[Candidate]:
        """Those shown of which no cheaper one has as many requests in time, the cheapest first."""
        found: list[Candidate] = []
        for one in sorted(self.shown, key=lambda c: (c.usd_per_h, c.trial.late)):
            if not found or one.trial.late < found[-1].trial.late:
                found.append(one)
        return found


def answer(
    question: Question,
    prices: Mapping[str, Price],
    table: RequestTable,
    progress: Callable[[str, int], None] = lambda text, num_trials: None,
) -> Answer:
    """Search for the cheapest fleet.

    Args:
        question: What is asked.
        prices: By GPU.
        table: The trace, as fast as it is to be served.
        progress: Called with what is searched and how many simulations there were.

    Raises:
        ConfigError: If nothing can serve the model, the longest request fits no replica, or the
            budget pays for none.
    """
    watch = _Watch(progress)
    watch.begin("costs of the replicas")
    options, left_out = find_options(question, prices)
    options, left_out = _that_hold_the_longest(question, options, left_out, table)
    _require_affordable(question, options)
    course = Course.over(question, [option.replica for option in options], table)
    search = Search(course, options, lambda: watch.tell(course.num_trials))
    course.try_all([(search.of((0, 1)), question.rules[0], 0)])  # kernels are loaded once
    watch.begin("fleets of one kind")
    alone = [search.alone(i) for i in range(len(options))]
    holding = [fleet for fleet in alone if fleet is not None]
    if question.mixed:
        watch.begin("mixed fleets")
        mixed = search.mixed(min((search.cost(fleet) for fleet in holding), default=None))
        holding += [mixed] if mixed is not None else []
    watch.begin("neighbours and picture")
    found = _Findings(search, question)
    best = min(holding, key=found.rank, default=None)
    others = found.others(best, alone, holding)
    shown = found.shown(best, alone)
    answered = found.candidate(found.whole(best)) if best is not None else None
    safe = None
    num_trials = course.num_trials
    if answered is not None and question.num_worlds:
        watch.begin("other worlds")
        worlds = Worlds(course, options, question.num_worlds)
        answered, others = found.asked(worlds, answered), found.all_asked(worlds, others)
        safe = found.safe(worlds, answered, holding)
        num_trials = course.num_trials + worlds.num_trials
    return Answer(
        question,
        prices,
        options,
        left_out,
        len(table),
        answered,
        safe,
        sorted(others, key=lambda one: (one.usd_per_h, one.trial.late)),
        shown,
        num_trials,
        watch.end(),
    )


class _Watch:
    """Says what is done, and notes how long it took."""

    def __init__(self, progress: Callable[[str, int], None]) -> None:
        self._progress = progress
        self._begun: list[tuple[str, float]] = []
        self._num_trials = 0

    def begin(self, text: str) -> None:
        """Note that something begins."""
        self._begun.append((text, time.perf_counter()))
        self.tell(self._num_trials)

    def tell(self, num_trials: int) -> None:
        """Say how many simulations there were."""
        self._num_trials = num_trials
        self._progress(self._begun[-1][0], num_trials)

    def end(self) -> dict[str, float]:
        """Return the seconds that each part took."""
        ends = [begun_s for _, begun_s in self._begun[1:]] + [time.perf_counter()]
        return {
            text: end_s - begun_s for (text, begun_s), end_s in zip(self._begun, ends, strict=True)
        }


def _require_affordable(question: Question, options: Sequence[Option]) -> None:
    budget = question.max_usd_per_h
    if budget is not None and budget < options[0].usd_per_h:
        raise ConfigError(
            f"the cheapest replica, {options[0].name}, costs ${options[0].usd_per_h:.2f} an hour: "
            f"a budget of ${budget:.2f} pays for none"
        )


def _that_hold_the_longest(
    question: Question, options: list[Option], left_out: list[LeftOut], table: RequestTable
) -> tuple[list[Option], list[LeftOut]]:
    """Leave out replicas whose KV cache is too small for the longest request."""
    longest = int((table.prompt_tokens.astype(int) + table.output_tokens - 1).max())
    kept, gone = [], list(left_out)
    for option in options:
        room = option.replica.capacity_tokens(question.engine.block_size)
        if room >= longest:
            kept.append(option)
        else:
            why = f"its KV cache holds {room:,} tokens, and the longest request needs {longest:,}"
            gone.append(LeftOut(option.name, why))
    if not kept:
        raise ConfigError(f"{gone[-1].name}: {gone[-1].why}: raise the degrees or cut the trace")
    return kept, gone


@dataclass
class _Findings:
    """What a search has found, in words."""

    search: Search
    question: Question

    def whole(self, fleet: Fleet, rule: str = "") -> Trial:
        """Return what became of the whole trace, under the best rule known unless one is named."""
        trial = self.search.judge(fleet).trial
        rule = rule or trial.rule
        if trial.num_requests == self.num_requests and trial.rule == rule:
            return trial
        last = len(self.search.course.stretches) - 1
        return self.search.course.try_all([(fleet, rule, last)])[0]

    @property
    def num_requests(self) -> int:
        """Of the whole trace."""
        return len(self.search.course.stretches[-1])

    def rank(self, fleet: Fleet) -> tuple[float, int, float]:
        """By rent; of equal ones the one of fewer kinds, then the one with more room."""
        kinds = sum(count > 0 for count in fleet)
        return self.search.cost(fleet), kinds, self.search.judge(fleet).trial.pressure

    def candidate(self, trial: Trial, why: str = "") -> Candidate:
        """Name a fleet."""
        name = fleet_text(trial.fleet, self.search.options)
        return Candidate(trial, name, usd_per_h(trial.fleet, self.search.options), why)

    def holds(self, trial: Trial) -> bool:
        """Whether the whole trace keeps the limits."""
        return trial.late <= self.question.allowed_late(self.num_requests)

    def others(
        self, best: Fleet | None, alone: Sequence[Fleet | None], holding: Sequence[Fleet]
    ) -> list[Candidate]:
        """Say of other fleets, and of other rules, why they lose."""
        found = [
            self.candidate(self.whole(fleet), self._dearer(fleet, best))
            for fleet in holding
            if fleet != best and best is not None
        ]
        for i, fleet in enumerate(alone):
            most = self.search.largest(i)
            if fleet is None and most:
                trial = self.whole(self.search.of((i, most)))
                found.append(self.candidate(trial, f"not even {most} are enough: {_late(trial)}"))
        if best is None:
            return found
        for i, count in enumerate(best):
            fewer = (*best[:i], count - 1, *best[i + 1 :])
            if count and sum(fewer):
                trial = self.whole(fewer)
                found.append(self.candidate(trial, f"one {self._name(i)} less: {_late(trial)}"))
        for rule in self.question.rules:
            trial = self.whole(best, rule)
            if rule != self.whole(best).rule:
                why = _late(trial) if not self.holds(trial) else "holds too, with less room"
                found.append(self.candidate(trial, f"the same fleet under {rule}: {why}"))
        return found

    def asked(self, worlds: Worlds, one: Candidate) -> Candidate:
        """Ask in how many worlds a fleet holds."""
        return replace(one, certainty=worlds.ask(one.trial.fleet, one.trial.rule))

    def all_asked(self, worlds: Worlds, others: Sequence[Candidate]) -> list[Candidate]:
        """Ask those that hold as predicted, the cheapest ones."""
        holding = sorted((c for c in others if self.holds(c.trial)), key=lambda c: c.usd_per_h)
        chosen = holding[:_ASKED]
        return [self.asked(worlds, one) if one in chosen else one for one in others]

    def safe(self, worlds: Worlds, best: Candidate, holding: Sequence[Fleet]) -> Candidate | None:
        """Look for the cheapest fleet that holds in nearly all worlds: those that hold, enlarged.

        Of the fleets that hold as predicted, and these with up to four more replicas of one of
        their kinds, the cheapest that is safe.
        """
        wanted = {(fleet, self.search.judge(fleet).trial.rule) for fleet in holding}
        for fleet, rule in sorted(wanted):
            for i, count in enumerate(fleet):
                for more in range(1, _MORE + 1) if count else ():
                    wanted.add(((*fleet[:i], count + more, *fleet[i + 1 :]), rule))
        most = self.question.max_replicas
        budget = self.question.max_usd_per_h or float("inf")
        fleets = [f for f in wanted if sum(f[0]) <= most and self.search.cost(f[0]) <= budget]
        found = worlds.safe(sorted(fleets, key=lambda f: (self.search.cost(f[0]), f)))
        if found is None:
            return None
        fleet, rule, certainty = found
        return replace(self.candidate(self.whole(fleet, rule)), certainty=certainty)

    def _name(self, option: int) -> str:
        return self.search.options[option].name

    def _dearer(self, fleet: Fleet, best: Fleet) -> str:
        mine, least = self.search.cost(fleet), self.search.cost(best)
        if mine == least:
            return "costs the same, and keeps less distance from the limits"
        return f"holds, and costs {mine / least - 1:.1%} more"

    def shown(self, best: Fleet | None, alone: Sequence[Fleet | None]) -> list[Candidate]:
        """Play what the picture needs beside what the search has played to the end."""
        search, wanted = self.search, set()
        limit = 1.5 * search.cost(best) if best is not None else float("inf")
        for i, fleet in enumerate(alone):
            enough = fleet[i] if fleet is not None else search.largest(i)
            counts = {max(1, round(enough * (k + 1) / _SHOWN_COUNTS)) for k in range(_SHOWN_COUNTS)}
            wanted |= {search.of((i, count)) for count in counts if search.largest(i)}
        judged = sorted((f for f in search.verdicts if sum(c > 0 for c in f) > 1), key=search.cost)
        wanted |= set(judged[:: max(1, len(judged) // _SHOWN_MIXED)])
        wanted = {fleet for fleet in wanted if search.cost(fleet) <= limit}
        last = len(search.course.stretches) - 1
        trials = {f: v.trial for f, v in search.verdicts.items()}
        whole = [t for t in trials.values() if t.num_requests == self.num_requests]
        known = {t.fleet for t in whole}
        jobs = [(f, search.judge(f).trial.rule, last) for f in sorted(wanted - known)]
        return [self.candidate(trial) for trial in [*whole, *search.course.try_all(jobs)]]


def _late(trial: Trial) -> str:
    """Say how many requests are late, and for what."""
    n = trial.num_requests
    return (
        f"{trial.attainment:.2%} in time; {trial.late_first / n:.2%} wait too long for their first "
        f"token, {trial.slow / n:.2%} get the others too slowly"
    )
