"""`servegym record`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from servegym.commands.console import make_console
from servegym.commands.workload import TRACE_OPTIONS, Played
from servegym.errors import ConfigError
from servegym.evaluate.tune import resolve
from servegym.policy.pair import Pair
from servegym.policy.placed import Placed
from servegym.policy.policy import Policy
from servegym.problems.registry import load_problem
from servegym.train.dataset import minari_library
from servegym.train.recording import Shaping, record

_RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Record(Played):
    """Record a policy's play on `servegym/Dispatch-v1` as a Minari data set.

    `servegym train --learner offline --dataset DIR` learns from it, as does whatever reads Minari.
    """

    output: Path
    """Folder of the data set; Minari's files go into `data/` in it."""
    policy: str = "added-delay"
    """Rule (see `servegym policies`), `NAME:tuned`, or file of a learned policy."""
    episodes: int = 32
    """Episodes to record."""
    load: tuple[float, float] = (0.6, 1.1)
    """Range of the load factor, drawn per episode."""
    num_requests: int | None = None
    """Requests per episode, instead of the scenario's own number."""
    seed: int = 0
    """Of the first episode; the others' follow."""
    explored: float = 0.0
    """Share of choices that a replica drawn evenly from those allowed replaces. The probability of
    what was done is recorded with it."""
    shaping: Shaping = "cost-to-go"
    """Of rewards; the return of a whole episode is the same either way."""
    extended: bool = False
    """Record what a router infers, too: the extended observation."""
    references: tuple[str, ...] = ("added-delay:tuned", "prefix-load:tuned")
    """Rules; the mean return of the best of them is score 1 of Minari's normalised score, that of
    the random rule score 0."""

    def run(self) -> None:
        """Record and say what was recorded."""
        minari_library()
        problem, scenario = load_problem(self.scenario)
        if problem.name != "dispatch":
            why = f"is for scenarios of requests, and {self.scenario} is one of {problem.unit}"
            self.refuse(("trace", *TRACE_OPTIONS), why)
            raise ConfigError(
                f"data sets are recorded of dispatchers, and {self.scenario} is a scenario of"
                f" problem {problem.name}: choose another"
            )
        file = self.chosen_file(self.output)
        problem, scenario = load_problem(file)

        def plain(text: str) -> Policy:
            found: Policy | Pair = resolve(problem, scenario, text, self.load, self.num_requests)
            if isinstance(found, Pair | Placed):
                raise ConfigError(f"{text} is more than a dispatcher, and only that is recorded")
            return found

        references = {_RANDOM: plain(_RANDOM)}
        for text in self.references:
            rule = plain(text)
            references[rule.name] = rule
        console = make_console()
        with Progress(transient=True) as bar:
            task = bar.add_task("recording", total=1.0)
            about = record(
                file,
                plain(self.policy),
                self.output,
                references,
                num_episodes=self.episodes,
                load=self.load,
                num_requests=self.num_requests,
                first_seed=self.seed,
                explored=self.explored,
                shaping=self.shaping,
                extended=self.extended,
                progress=lambda share: bar.update(task, completed=share),
            )
        scores = ", ".join(f"{name} {score:,.1f}" for name, score in about["references"].items())
        console.print(
            f"{self.episodes} episodes in {self.output}: mean return {about['mean_return']:,.1f}"
            f" ({scores})",
            soft_wrap=True,
            highlight=False,
        )
