"""A suite: fixed scenarios and seeds, and scores against what was recorded of them.

`assets/suites/NAME/suite.yaml` says what is played; `recorded.json` beside it holds what the tuned
rules and the clairvoyant search reached there, written by `scripts/record-bench`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from servegym.documents import checked, read_mapping
from servegym.errors import ConfigError, ServeGymError, unknown_name
from servegym.evaluate.compare import Ratio, Share, headroom_share, paired_ratio
from servegym.evaluate.harness import CLAIRVOYANT, NUM_STARTS, evaluate
from servegym.evaluate.tune import resolve
from servegym.problems.objective import Objective
from servegym.problems.problem import AnyProblem
from servegym.problems.registry import load_problem
from servegym.scenario.config import Config, Factor
from servegym.typing import FloatArray

_FOLDER, _FILE = "suites", "suite.yaml"
#: Beside it, what was recorded.
RECORDED = "recorded.json"
#: Training has the seeds below the first one, validation those from there on, the test these; no
#: other command plays them.
FIRST_VALIDATION_SEED, FIRST_TEST_SEED = 500_000, 9_000_000
#: A policy is clearly worse on a control if it loses more than this.
CONTROL_TOLERANCE = 0.01
#: Scenarios in which a policy fails altogether count no more than this, so that others count too.
LEAST_SCORE = -1.0

Progress = Callable[[str], None]


class SuiteScenario(Config):
    """A scenario of a suite.

    Attributes:
        name: In the suite.
        scenario: A bundled one by name, or a file beside the suite.
        regime: What it stands for.
        loads: Load factors; the score is the mean over them.
        num_units: Requests or jobs per episode.
        is_control: Whether there is nothing to gain, and a policy must only not lose.
        bound_budget: Simulation of the clairvoyant search, if it is not that of the suite.
    """

    name: str
    scenario: str
    regime: str
    loads: tuple[Factor, ...] = Field((1.0,), min_length=1)
    num_units: int = Field(ge=1)
    is_control: bool = False
    bound_budget: float | None = Field(None, gt=0)


class Suite(Config):
    """What is played.

    Attributes:
        name: With its version.
        description: In a sentence.
        scenarios: In the order of tables.
        num_test_seeds: Test episodes per scenario and load, from `FIRST_TEST_SEED` on.
        bound_budget: Simulation of the clairvoyant search for an episode, in whole episodes.
        folder: Where it was loaded from.
    """

    name: str
    description: str
    scenarios: tuple[SuiteScenario, ...] = Field(min_length=1)
    num_test_seeds: int = Field(ge=1)
    bound_budget: float = Field(gt=0)
    folder: Path

    @property
    def seeds(self) -> list[int]:
        """Seeds of the test split."""
        return [FIRST_TEST_SEED + i for i in range(self.num_test_seeds)]

    def pose(self, entry: SuiteScenario) -> tuple[AnyProblem, Any]:
        """Return the problem and the scenario of an entry."""
        name = entry.scenario
        if name.endswith(".yaml"):
            name = str(self.folder / name)
        return load_problem(name)


class Score(NamedTuple):
    """How a policy did on a scenario at a load.

    Attributes:
        share: Of the headroom, 0 the best tuned rule and 1 the clairvoyant search.
        ratio: Of the metric, to the best tuned rule's.
        mean: Of the metric.
    """

    share: Share
    ratio: Ratio
    mean: float


@dataclass(frozen=True)
class Reference:
    """What was recorded of a scenario at a load.

    Attributes:
        objective: What policies are judged by.
        best: The best tuned rule.
        rule_values: Its metric, `float64[seeds]`.
        bound_values: That of the clairvoyant search, `float64[seeds]`.
    """

    objective: Objective
    best: str
    rule_values: FloatArray
    bound_values: FloatArray

    def score(self, values: FloatArray) -> Score:
        """Judge a policy by its metric, `float64[seeds]`."""
        return Score(
            headroom_share(values, self.rule_values, self.bound_values, self.objective.sign),
            paired_ratio(values, self.rule_values),
            float(values.mean()),
        )


def suite_names() -> list[str]:
    """Names of the bundled suites."""
    folders = resources.files("servegym.assets").joinpath(_FOLDER).iterdir()
    return sorted(folder.name for folder in folders if folder.is_dir())


def load_suite(name_or_folder: str) -> Suite:
    """Load a bundled suite by name, or one of your own by its folder.

    Raises:
        ConfigError: If there is none, or its file is wrong.
    """
    folder = Path(name_or_folder)
    if not (folder / _FILE).is_file():
        if name_or_folder not in suite_names():
            message = unknown_name("suite", name_or_folder, suite_names())
            also = " Or" if message.endswith("?") else ", or"
            raise ConfigError(f"{message}{also} give a folder with a {_FILE}")
        folder = Path(str(resources.files("servegym.assets").joinpath(_FOLDER, name_or_folder)))
    path = folder / _FILE
    data = read_mapping(path.read_text(encoding="utf-8"), str(path), "name and scenarios")
    return checked({**data, "folder": folder}, str(path), Suite)


def load_record(suite: Suite) -> dict[str, Any]:
    """Load what was recorded of a suite.

    Raises:
        ConfigError: If nothing was.
    """
    path = suite.folder / RECORDED
    if not path.is_file():
        raise ConfigError(f"nothing is recorded of {suite.name}: run scripts/record-bench")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def reference(suite: Suite, record: dict[str, Any], entry: SuiteScenario, load: float) -> Reference:
    """Return what was recorded of a scenario at a load.

    Raises:
        ConfigError: If the scenario is not what it was when that was recorded.
    """
    problem, scenario = suite.pose(entry)
    found = record["scenarios"].get(entry.name, {}).get(f"{load:g}")
    if found is None or found["episode"] != episode_name(suite, entry, load):
        raise ConfigError(
            f"scenario {entry.name} of {suite.name} at load {load:g} is not what was recorded: run"
            " scripts/record-bench, or use the version that recorded it"
        )
    best = found["best_rule"]
    return Reference(
        problem.objective(scenario),
        best,
        np.array(found["rules"][best]["values"]),
        np.array(found["bound"]["values"]),
    )


def episode_name(suite: Suite, entry: SuiteScenario, load: float) -> str:
    """Name the first test episode by its content."""
    problem, scenario = suite.pose(entry)
    return problem.key(scenario, FIRST_TEST_SEED, load, entry.num_units).hex()


def play(
    suite: Suite,
    entry: SuiteScenario,
    load: float,
    texts: Sequence[str],
    *,
    bound_budget: float = 0.0,
    progress: Progress = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Play the test split of a scenario at a load.

    Args:
        suite: It is part of.
        entry: The scenario.
        load: The load factor.
        texts: Policies as `evaluate.tune.resolve` takes them; `NAME:tuned` is tuned on the training
            split at this load.
        bound_budget: Simulation of the clairvoyant search, 0 for none; its row is `CLAIRVOYANT`.
        progress: Called with what is done.

    Returns:
        Of each text: `policy` as it was resolved, `information`, `values` of the metric over the
        seeds, `decision_s`, the median time of a decision.
    """
    problem, scenario = suite.pose(entry)
    policies = {}
    for text in texts:
        progress(f"{entry.name} {load:g}: {text}")
        policies[text] = resolve(problem, scenario, text, [load], entry.num_units)
    unique = {policy.name: policy for policy in policies.values()}
    result = evaluate(
        scenario,
        list(unique.values()),
        problem=problem,
        loads=[load],
        num_seeds=suite.num_test_seeds,
        first_seed=FIRST_TEST_SEED,
        num_units=entry.num_units,
        bound_budget=bound_budget,
        progress=lambda text, share: progress(f"{entry.name}: {text}"),
    )
    metric = result.objective.metric
    rows = {
        text: {
            "policy": policy.name,
            "information": policy.information,
            "values": result.values(policy.name, load, metric).tolist(),
            "decision_s": result.decision_s[policy.name][0],
        }
        for text, policy in policies.items()
    }
    if bound_budget > 0:
        rows[CLAIRVOYANT] = {"values": result.values(CLAIRVOYANT, load, metric).tolist()}
    return rows


def playable(problem: AnyProblem, scenario: Any, text: str) -> ServeGymError | None:
    """Say why a policy cannot play a scenario, `None` if it can; nothing is tuned for that."""
    try:
        problem.resolve(text.removesuffix(":tuned"))
    except ServeGymError as error:
        return error
    return None


def record_scenario(
    suite: Suite,
    entry: SuiteScenario,
    load: float,
    rules: Sequence[str],
    oracles: Sequence[str],
    *,
    recorded_by: dict[str, str],
    kept: dict[str, Any] | None = None,
    searched: bool = True,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Find out what rules and the clairvoyant search reach on the test split of a scenario.

    Args:
        suite: It is part of.
        entry: The scenario.
        load: The load factor.
        rules: Those that may be the reference and are played now, tuned where they can be.
        oracles: Further starts of the search.
        recorded_by: Command and revision, noted beside all that is made.
        kept: What was recorded before: rules that are not played now stay.
        searched: Whether the search is made; else what was recorded of it stays.
        progress: Called with what is done.

    Raises:
        ConfigError: If there is nothing to keep, or it is of another scenario.
    """
    episode = episode_name(suite, entry, load)
    if (kept is not None and kept["episode"] != episode) or (kept is None and not searched):
        raise ConfigError(
            f"scenario {entry.name} of {suite.name} at load {load:g} is not what was recorded:"
            " nothing of it can be kept"
        )
    problem, scenario = suite.pose(entry)
    sign = problem.objective(scenario).sign

    def order(found: dict[str, Any]) -> list[str]:
        return sorted(found, key=lambda text: sign * float(np.mean(found[text]["values"])))

    before = kept["rules"] if kept else {}
    starts = []
    if searched:
        best = [before[text]["policy"] for text in order(before)[:NUM_STARTS]]
        starts = [*(text for text in best if text not in rules), *oracles]
    budget = (entry.bound_budget or suite.bound_budget) if searched else 0.0
    rows = play(suite, entry, load, [*rules, *starts], bound_budget=budget, progress=progress)
    made = {text: {**rows[text], "recorded_by": recorded_by} for text in rules}
    found = {**before, **made}
    if searched:
        values = rows[CLAIRVOYANT]["values"]
        bound = {"budget_episodes": budget, "values": values, "recorded_by": recorded_by}
    else:
        bound = kept["bound"] if kept else {}
    # the search began with a few rules; another one, or one added since, may be better on a seed
    reached = np.array([bound["values"], *(row["values"] for row in found.values())])
    return {
        "episode": episode,
        "metric": problem.objective(scenario).metric,
        "seeds": suite.seeds,
        "best_rule": order(found)[0],
        "rules": found,
        "bound": {**bound, "values": (sign * (sign * reached).min(0)).tolist()},
    }
