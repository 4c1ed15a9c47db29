"""All problems, and from a scenario's name, path or object to its problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servegym.errors import ConfigError, unknown_name
from servegym.problems.dispatch import Dispatch
from servegym.problems.order import Order
from servegym.problems.problem import AnyProblem, Scenario
from servegym.problems.workflow import Workflow

#: By name, in the order of lists.
PROBLEMS: dict[str, AnyProblem] = {p.name: p for p in (Dispatch(), Order(), Workflow())}


def scenario_names() -> list[str]:
    """Names of all bundled scenarios, problem by problem."""
    return [name for problem in PROBLEMS.values() for name in problem.scenario_names()]


def load_problem(name_or_path: str | Path) -> tuple[AnyProblem, Any]:
    """Find out what problem a scenario is of, and load it.

    Args:
        name_or_path: Name of a bundled scenario, or path of a YAML file.

    Returns:
        The problem and the scenario.

    Raises:
        ConfigError: If there is none, or a key or value in it is not allowed.
    """
    text = str(name_or_path)
    if not text.endswith((".yaml", ".yml")) and text not in scenario_names():
        message = unknown_name("scenario", text, scenario_names())
        also = " Or" if message.endswith("?") else ", or"
        raise ConfigError(f"{message}{also} give a .yaml file")
    for problem in PROBLEMS.values():
        scenario = problem.find(text)
        if scenario is not None:
            return problem, scenario
    raise ConfigError(f"{text} is a scenario of no problem: choose {', '.join(PROBLEMS)}")


def problem_of(scenario: Scenario) -> AnyProblem:
    """Return the problem that a loaded scenario is of.

    Raises:
        ConfigError: If it is of none of ours.
    """
    for problem in PROBLEMS.values():
        if problem.owns(scenario):
            return problem
    raise ConfigError(
        f"{scenario.name} is a scenario of none of {', '.join(PROBLEMS)}: name its problem"
    )


def find_problem(name: str) -> AnyProblem:
    """Return a problem by its name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PROBLEMS:
        raise ConfigError(unknown_name("problem", name, PROBLEMS))
    return PROBLEMS[name]
