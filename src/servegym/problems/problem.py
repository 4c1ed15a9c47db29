"""What a problem has to say, so that all else is written once: rules, tuning, comparison, pages.

`evaluate.harness.evaluate` compares policies of any problem; a new one is a subclass of `Problem`
and one of `Episodes`, here or anywhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from servegym.baselines.rules import Rules
from servegym.costs.step import StepCost
from servegym.costs.uncertainty import World
from servegym.errors import ConfigError
from servegym.export.manifest import Contract as Contract
from servegym.export.manifest import contract_of
from servegym.problems.objective import Objective
from servegym.typing import FloatArray
from servegym.workloads.trace import Trace


class Scenario(Protocol):
    """What every scenario has, whatever is decided on it."""

    @property
    def name(self) -> str:
        """Name in tables."""

    @property
    def description(self) -> str:
        """What it is, in a sentence or two."""

    def model_dump_json(self) -> str:
        """All of it as JSON."""


class Policy(Protocol):
    """What every policy has, whatever it decides."""

    @property
    def name(self) -> str:
        """Name in tables."""

    @property
    def information(self) -> str:
        """What it may know: blind, metric, predictive or oracle."""


class Played(NamedTuple):
    """What became of episodes under a policy.

    Attributes:
        metrics: Of each episode, by name.
        trail: What figures need of the first one.
    """

    metrics: list[dict[str, float]]
    trail: Any


class Column(NamedTuple):
    """A column of the comparison.

    Attributes:
        heading: Its name.
        metric: What it shows.
        factor: On the metric.
        digits: Behind the decimal point.
        dispensable: When a narrow terminal goes without it: 1 first, then 2; 0 never.
    """

    heading: str
    metric: str
    factor: float
    digits: int
    dispensable: int = 0

    def cell(self, value: float) -> str:
        """Show a value of the metric."""
        return f"{self.factor * value:,.{self.digits}f}"


class Comparison(Protocol):
    """What figures see of an evaluation; see `evaluate.harness.Evaluation`.

    Attributes:
        scenario: What was played.
        loads: Load factors.
        learned: Names of learned policies.
        trails: `Played.trail` of the first seed, by policy and load.
    """

    scenario: Any
    loads: list[float]
    learned: list[str]
    trails: dict[tuple[str, float], Any]

    def mean(self, policy: str, load: float, metric: str) -> float:
        """Mean of a metric over the seeds that have it."""

    def ranking(self, load: float) -> list[tuple[str, str]]:
        """Name and information class of all policies, the best by the objective first."""

    def best_heuristic(self, load: float) -> str:
        """Name of the best policy that is neither an oracle nor learned."""

    def shown_policies(self, load: float, limit: int = 8) -> list[str]:
        """The learned policies, the best ones and the worst: what figures have room for."""


class Figure(NamedTuple):
    """A part of the report.

    Attributes:
        title: Its heading; `{load:g}` is the largest load.
        draw: Makes HTML of the comparison at a load.
        note: What a reader has to know.
        style: CSS that it needs.
        script: JavaScript that it needs.
    """

    title: str
    draw: Callable[[Comparison, float], str]
    note: str = ""
    style: str = ""
    script: str = ""


class Section(NamedTuple):
    """A part of the report that needs more than the comparison.

    Attributes:
        title: Its heading.
        sentences: What it says.
        figure: HTML of its figure, if there is one.
        note: What a reader has to know.
    """

    title: str
    sentences: list[str]
    figure: str
    note: str


class Plot(NamedTuple):
    """The picture that `servegym evaluate --plot` writes.

    Attributes:
        draw: Makes a Matplotlib figure of a stretch of the first episode at a load.
    """

    draw: Callable[[Comparison, float], Any]


S = TypeVar("S", bound=Scenario)
P = TypeVar("P", bound=Policy)


class Episodes(ABC, Generic[P]):
    """Episodes that any policy can play, each from its beginning."""

    @abstractmethod
    def play(self, policy: P, seed: int = 0) -> Played:
        """Play all of them; `seed` is that of the policy's own randomness."""

    @abstractmethod
    def losses(self, policy: P) -> FloatArray:
        """Play all of them for the objective alone, for tuning and training.

        Returns:
            Lower is better, `float64[num_episodes]`, in the objective's unit; see
            `Objective.loss_text`.
        """

    @abstractmethod
    def time_decisions(self, policy: P) -> FloatArray:
        """Measure single decisions in the first episode, seconds, `float64[n]`."""

    def clairvoyant(self, starts: Sequence[P], *, budget: float, seed: int = 0) -> Played:
        """Play all of them as an offline search finds best that knows their whole future.

        Args:
            starts: Policies; the search begins, episode by episode, with what the best did.
            budget: Simulation it may take for an episode, in whole episodes.
            seed: Of the policies' own randomness, and of the search.

        Raises:
            ConfigError: If there is no such search.
        """
        raise ConfigError("there is no clairvoyant search for these episodes: leave --bound out")


@dataclass(frozen=True)
class Saturation:
    """How the largest load that a policy bears is searched.

    Attributes:
        metric: Share of an episode that is as it should be.
        what: What tables call such a share, such as "jobs in time".
    """

    metric: str
    what: str


class Problem(ABC, Generic[S, P]):
    """One kind of decision: everything that is particular to it.

    What is not abstract may be left as it is: then there are no bundled scenarios, no files of
    learned policies, no figures, no search for the largest load.

    Attributes:
        name: Its name.
        decides: What is decided, as the end of "it decides".
        unit: What an episode is made of, in the plural.
        load: What the load factor multiplies.
        rules: All rules.
        default_policies: Compared unless policies are named; see `compared`.
        default_policy: Simulated unless one is named.
        columns: Of the comparison.
        counted: What of an episode the metrics are over, as a sentence's part.
        truth: What an oracle knows.
        figures: Of the report, between the comparison and the end.
        plot: Picture of a stretch of the first episode, if there is one.
        takes_trace: Whether a trace can stand for a scenario's workload.
        saturation: How the largest load is searched, if that makes sense.
    """

    name: ClassVar[str]
    decides: ClassVar[str]
    unit: ClassVar[str]
    load: ClassVar[str]
    rules: ClassVar[Rules[Any]]
    default_policies: ClassVar[tuple[str, ...]]
    default_policy: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]
    counted: ClassVar[str] = "all counted"
    truth: ClassVar[str] = "what others predict"
    figures: ClassVar[tuple[Figure, ...]] = ()
    plot: ClassVar[Plot | None] = None
    takes_trace: ClassVar[bool] = False
    saturation: ClassVar[Saturation | None] = None

    def compared(self, scenario: S) -> tuple[str, ...]:
        """Name the policies that are compared on a scenario unless others are named."""
        return self.default_policies

    def contract(self) -> Contract:
        """What a policy sees at a decision; by default what files of its policies say."""
        return contract_of(self.name)

    @abstractmethod
    def objective(self, scenario: S) -> Objective:
        """What counts in a scenario."""

    @abstractmethod
    def episodes(
        self,
        scenario: S,
        seeds: Sequence[int],
        *,
        load: float = 1.0,
        num_units: int | None = None,
    ) -> Episodes[P]:
        """Draw the episodes of seeds at a load; they do not depend on who plays them.

        Args:
            scenario: What is played.
            seeds: One an episode.
            load: Factor on the scenario's own.
            num_units: Requests or jobs per episode, else the scenario's own.

        Raises:
            ConfigError: If the load or the number is impossible.
        """

    def episodes_in(
        self,
        world: World,
        scenario: S,
        seeds: Sequence[int],
        *,
        load: float = 1.0,
        num_units: int | None = None,
    ) -> Episodes[P]:
        """Draw the same episodes in a world in which kernels and engines are off.

        Raises:
            ConfigError: If there are no such worlds.
        """
        raise ConfigError(
            f"how far times of {self.name} may be off is not known: leave --uncertainty out"
        )

    @abstractmethod
    def key(self, scenario: S, seed: int, load: float, num_units: int | None) -> bytes:
        """Name an episode: those with equal keys are the same."""

    def scenario_names(self) -> list[str]:
        """Names of the bundled scenarios."""
        return []

    def find(self, name_or_path: str) -> S | None:
        """Load a bundled scenario or a YAML file; `None` if it is of another problem.

        Raises:
            ConfigError: If it cannot be used as it is.
        """
        return None

    def owns(self, scenario: Scenario) -> bool:
        """Whether a scenario that was loaded is of this problem."""
        return False

    def fleet(self, scenario: S) -> str:
        """Who serves, for lists."""
        return ""

    def pace(self, scenario: S) -> str:
        """How much there is to do at load 1, for lists."""
        return ""

    def resolve(self, text: str) -> P:
        """Return a rule by name and parameters, or a learned policy by its file.

        Raises:
            ConfigError: If there is no such rule or parameter.
            ExportError: If the file is not a valid policy.
        """
        made: P = self.rules.make(text)
        return made

    def parts(self, text: str) -> list[tuple[Rules[Any], str]]:
        """Of which rules a policy is put together, with the text of each; most are of one."""
        return [(self.rules, text)]

    def is_learned(self, policy: P) -> bool:
        """Whether a policy was learned: then it is compared with the best of the others."""
        return bool(getattr(policy, "learned", False))

    def differences(
        self, scenario: S, learned: P, rule: P, *, seed: int, load: float, num_units: int | None
    ) -> Section | None:
        """Say what a learned policy does otherwise than a rule, if anything can be said.

        Args:
            scenario: What is played.
            learned: The policy.
            rule: The rule.
            seed: Of the episode that is looked at.
            load: Its load.
            num_units: Its requests or jobs, else the scenario's own.
        """
        return None

    def notes(
        self,
        scenario: S,
        seeds: Sequence[int],
        loads: Sequence[float],
        num_units: int | None,
    ) -> list[str]:
        """Say what readers must know of these episodes, in sentences."""
        return []

    def trace(self, scenario: S) -> Trace | None:
        """The trace that is played, if one is."""
        return None

    def require_saturation(self, scenario: S) -> Saturation:
        """Say how the largest load is searched, or refuse where there is none.

        Raises:
            ConfigError: If no load is too high.
        """
        if self.saturation is None:
            raise ConfigError(
                f"{self.name} has no largest load to search for: leave --saturation out"
            )
        return self.saturation

    def step_costs(self, scenario: S) -> dict[str, StepCost]:
        """What a step costs on each kind of replica, by its name."""
        return {}


AnyProblem = Problem[Any, Any]
