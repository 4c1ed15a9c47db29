"""Due dates: scores of schedules against them, and single-machine instances to compare rules on."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from servegym.errors import ConfigError
from servegym.typing import FloatArray
from servegym.workflow.graph import Workflow, make_workflow
from servegym.workflow.schedule import Schedule

#: Sizes of the benchmark; there are 25 instances of each, one for each setting of `SETTINGS`.
SIZES = (20, 50, 100)
#: Tardiness factor and range of due dates, the usual grid.
SETTINGS = tuple(product((0.2, 0.4, 0.6, 0.8, 1.0), repeat=2))
NUM_INSTANCES = len(SIZES) * len(SETTINGS)


class DueDateScores(NamedTuple):
    """How well a schedule meets its due dates, by weight where tasks have weights.

    Attributes:
        tardiness_s: Weighted sum over tasks of the time by which they finish too late.
        flow_s: Weighted sum of the finishes.
        num_late: Tasks that finish after their due date.
        max_lateness_s: Largest finish less due date; negative if all are early.
    """

    tardiness_s: float
    flow_s: float
    num_late: int
    max_lateness_s: float


def due_dates_of(workflow: Workflow) -> tuple[FloatArray, FloatArray]:
    """Return due dates (inf where there is none) and weights of the tasks, `float64[num_tasks]`."""
    due_s, weight = workflow.due_s, workflow.weight
    return (
        np.full(workflow.num_tasks, np.inf) if due_s is None else due_s,
        np.ones(workflow.num_tasks) if weight is None else weight,
    )


def due_date_scores(schedule: Schedule) -> DueDateScores:
    """Score a schedule against the due dates of its workflow."""
    due_s, weight = due_dates_of(schedule.workflow)
    late_s = schedule.finish_s - due_s
    return DueDateScores(
        tardiness_s=float(weight @ np.maximum(late_s, 0.0)),
        flow_s=float(weight @ schedule.finish_s),
        num_late=int((late_s > 0.0).sum()),
        max_lateness_s=float(late_s.max()),
    )


def require_single_machine(workflow: Workflow, rule: str) -> FloatArray:
    """Return the durations of independent tasks on one device, `float64[num_tasks]`.

    Raises:
        ConfigError: If there are edges or further devices.
    """
    if workflow.num_devices != 1 or workflow.num_edges:
        raise ConfigError(
            f"{rule} is a single-machine rule: {workflow.name} must be tasks without edges on one"
            f" device, got {workflow.num_edges} edges and {workflow.num_devices} devices"
        )
    own: FloatArray = workflow.graph.duration_s[:, 0]
    return own


def require_due_dates(workflow: Workflow, rule: str) -> None:
    """Refuse a workflow in which no task has a due date."""
    if workflow.due_s is None:
        raise ConfigError(f"{rule} orders by due dates: give due_s of the tasks")


def single_machine(
    duration_s: FloatArray,
    due_s: FloatArray,
    weight: FloatArray | None = None,
    name: str = "single machine",
) -> Workflow:
    """Make a workflow of independent tasks with due dates on one device.

    Args:
        duration_s: `float64[num_jobs]`.
        due_s: Likewise.
        weight: Likewise; None: all 1.
        name: Shown in results.
    """
    jobs = [f"job{j}" for j in range(len(duration_s))]
    return make_workflow(
        jobs,
        ["machine"],
        np.reshape(duration_s, (-1, 1)),
        [],
        due_s=due_s,
        weight=weight,
        name=name,
    )


def random_single_machine(
    num_jobs: int, tardiness_factor: float, due_range: float, seed: int, *, weighted: bool = False
) -> Workflow:
    """Draw jobs as Potts and Van Wassenhove (1982) did.

    Durations are whole seconds from 1 to 100. With P their sum, due dates are whole seconds from
    `P (1 - tardiness_factor - due_range / 2)` to `P (1 - tardiness_factor + due_range / 2)`, those
    below 0 taken as 0.

    Args:
        num_jobs: Jobs.
        tardiness_factor: About the share of jobs that will be late.
        due_range: Spread of the due dates over P.
        seed: Of the draw.
        weighted: Draw weights from 1 to 10; else all are 1.
    """
    rng = np.random.default_rng(seed)
    duration_s = rng.integers(1, 101, num_jobs)
    total_s = duration_s.sum()
    ends_s = total_s * (1.0 - tardiness_factor + np.array([-0.5, 0.5]) * due_range)
    due_s = rng.integers(np.ceil(ends_s[0]), np.floor(ends_s[1]) + 1, num_jobs)
    return single_machine(
        duration_s.astype(float),
        np.maximum(due_s, 0).astype(float),
        rng.integers(1, 11, num_jobs).astype(float) if weighted else None,
        f"{num_jobs} jobs, T {tardiness_factor:g}, R {due_range:g}",
    )


def tardiness_instance(number: int) -> Workflow:
    """Return an instance of the benchmark by its number, from 1 to 75.

    Raises:
        ConfigError: If there is none of that number.
    """
    if not 1 <= number <= NUM_INSTANCES:
        raise ConfigError(f"instances of tardiness are numbered 1 to {NUM_INSTANCES}, got {number}")
    size, setting = divmod(number - 1, len(SETTINGS))
    tardiness_factor, due_range = SETTINGS[setting]
    return random_single_machine(SIZES[size], tardiness_factor, due_range, seed=number)
