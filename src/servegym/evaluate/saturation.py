"""The largest load a policy bears."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from servegym.errors import ConfigError
from servegym.evaluate.harness import FIRST_SEED, evaluate
from servegym.evaluate.workflow import evaluate_workflows
from servegym.policy.ordering import OrderingPolicy
from servegym.policy.policy import Policy
from servegym.scenario import Scenario
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow_scenario import WorkflowScenario
from servegym.workloads.config import TraceConfig


def saturation_load(
    scenario: Scenario,
    policy: Policy | OrderingPolicy,
    attainment: float,
    *,
    num_seeds: int = 3,
    num_requests: int | None = None,
    low: float = 0.05,
    high: float = 4.0,
    tolerance: float = 0.02,
) -> float:
    """Bisect for the largest load at which `attainment` of the requests meet their limits.

    Args:
        scenario: What to play.
        policy: Under which policy.
        attainment: Share, e.g. 0.9.
        num_seeds: Episodes per load; the same for every load.
        num_requests: Requests per episode, else the scenario's own.
        low: Smallest load tried.
        high: Largest load tried.
        tolerance: Relative precision of the answer.

    Returns:
        The load, 0 if even `low` is too much, `high` if nothing is.

    Raises:
        ConfigError: If there is none, see `require_rate`.
    """
    require_rate(scenario)

    def met(load: float) -> bool:
        result = evaluate(
            scenario,
            [policy],
            loads=[load],
            num_seeds=num_seeds,
            first_seed=FIRST_SEED,
            num_requests=num_requests,
        )
        return result.mean(policy.name, load, "slo_attainment") >= attainment

    return _largest(met, low, high, tolerance)


def saturation_load_of_jobs(
    scenario: WorkflowScenario,
    policy: WorkflowPolicy,
    attainment: float,
    *,
    num_seeds: int = 3,
    num_jobs: int | None = None,
    low: float = 0.05,
    high: float = 4.0,
    tolerance: float = 0.02,
) -> float:
    """Bisect for the largest load at which `attainment` of the jobs are in time.

    Args:
        scenario: What to play.
        policy: Under which policy.
        attainment: Share, e.g. 0.9.
        num_seeds: Episodes per load; the same for every load.
        num_jobs: Jobs per episode, else the scenario's own.
        low: Smallest load tried.
        high: Largest load tried.
        tolerance: Relative precision of the answer.

    Returns:
        The load, 0 if even `low` is too much, `high` if nothing is.

    Raises:
        ConfigError: If there is none, see `require_limits`.
    """
    require_limits(scenario)

    def met(load: float) -> bool:
        result = evaluate_workflows(
            scenario, [policy], loads=[load], num_seeds=num_seeds, num_jobs=num_jobs
        )
        return result.mean(policy.name, load, "deadline_attainment") >= attainment

    return _largest(met, low, high, tolerance)


def require_rate(scenario: Scenario) -> None:
    """Refuse to search where no load is too high.

    Raises:
        ConfigError: If all requests of a trace arrive together.
    """
    workload = scenario.played_workload
    if isinstance(workload, TraceConfig) and workload.is_batch:
        raise ConfigError(
            f"all requests of {workload.path} arrive at one time, so that there is no largest load:"
            " leave --saturation out"
        )


def require_limits(scenario: WorkflowScenario) -> None:
    """Refuse to search where no load is too high.

    Raises:
        ConfigError: If the jobs have no deadlines, or all arrive together.
    """
    jobs = scenario.draw_jobs(FIRST_SEED, scenario.num_jobs)
    if scenario.rate_jobs_per_s is None or not any(np.isfinite(job.deadline_s) for job in jobs):
        raise ConfigError(
            f"jobs of {scenario.name} have no deadlines or no rate of arrival, so that there is no"
            " largest load: leave --saturation out"
        )


def _largest(met: Callable[[float], bool], low: float, high: float, tolerance: float) -> float:
    if not met(low):
        return 0.0
    if met(high):
        return high
    while high / low > 1.0 + tolerance:
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if met(middle) else (low, middle)
    return low
