"""An evaluation spread over a Ray cluster: a task plays one policy at one load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from servegym.errors import ConfigError
from servegym.evaluate.harness import FIRST_SEED, Evaluation, evaluate, planned
from servegym.problems.problem import Scenario
from servegym.problems.registry import problem_of


def evaluate_on_ray(
    scenario: Scenario,
    texts: Sequence[str],
    *,
    loads: Sequence[float] = (1.0,),
    num_seeds: int = 10,
    first_seed: int = FIRST_SEED,
    num_units: int | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Evaluation:
    """Play every policy on the same episodes, as `evaluate` does, to the same numbers.

    The cluster is that of `ray.init`: what RAY_ADDRESS names, else one started on this machine.

    Args:
        scenario: What to play; it travels with each task.
        texts: Policies by name or file; files must be where tasks run, too.
        loads: Load factors.
        num_seeds: Episodes per load; those that would be played again are left out.
        first_seed: Their seeds count from here.
        num_units: Requests or jobs per episode, else the scenario's own.
        progress: Called with what is done and the share of the work.

    Raises:
        ConfigError: If Ray is missing.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--ray needs ray: pip install -e '.[ray]' in a checkout of servegym"
        ) from error
    problem = problem_of(scenario)
    policies = [problem.resolve(text) for text in texts]
    result = planned(problem, scenario, policies, loads, num_seeds, first_seed, num_units)
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    play = ray.remote(_play)
    waiting: dict[Any, tuple[str, float]] = {}
    for load in result.loads:
        for text in texts:
            task = play.remote(scenario, text, load, num_seeds, first_seed, num_units)
            waiting[task] = text, load
    num_tasks, parts = len(waiting), {}
    while waiting:
        (task,), _ = ray.wait(list(waiting))
        text, load = waiting.pop(task)
        parts[text, load] = ray.get(task)
        progress(f"{text} at load {load:g}", 1.0 - len(waiting) / num_tasks)
    for load in result.loads:
        for text in texts:
            part = parts[text, load]
            result.runs += part.runs
            result.trails |= part.trails
            for name, taken in part.decision_s.items():
                result.decision_s.setdefault(name, taken)
    return result


def _play(
    scenario: Scenario,
    text: str,
    load: float,
    num_seeds: int,
    first_seed: int,
    num_units: int | None,
) -> Evaluation:
    """Play one policy at one load."""
    policy = problem_of(scenario).resolve(text)
    found = evaluate(
        scenario,
        [policy],
        loads=[load],
        num_seeds=num_seeds,
        first_seed=first_seed,
        num_units=num_units,
    )
    found.problem = None  # type: ignore[assignment]  # whoever asked has it, and compiled rules with it
    return found
