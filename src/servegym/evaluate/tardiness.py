"""How far single-machine rules are from the least total tardiness."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from servegym.baselines.workflow.lawler import lawler
from servegym.baselines.workflow.registry import WorkflowRule
from servegym.workflow.graph import Workflow
from servegym.workflow.tardiness import DueDateScores, due_date_scores


class TardinessRow(NamedTuple):
    """One policy on one instance.

    Attributes:
        instance: Name of the instance.
        num_jobs: Its size.
        policy: Name of the policy.
        scores: Of its schedule.
        least_s: Total tardiness of the best schedule.
        elapsed_s: Wall time it took.
    """

    instance: str
    num_jobs: int
    policy: str
    scores: DueDateScores
    least_s: float
    elapsed_s: float


def tardiness_gaps(
    instances: Iterable[Workflow], policies: Mapping[str, WorkflowRule]
) -> Iterator[TardinessRow]:
    """Schedule jobs with equal weights on one machine, one row a policy, as they are done."""
    for jobs in instances:
        least_s = due_date_scores(lawler(jobs)).tardiness_s
        for name, policy in policies.items():
            begin_s = time.perf_counter()
            schedule = policy(jobs)
            elapsed_s = time.perf_counter() - begin_s
            scores = due_date_scores(schedule)
            yield TardinessRow(jobs.name, jobs.num_tasks, name, scores, least_s, elapsed_s)


def total_gaps(rows: Iterable[TardinessRow]) -> dict[str, dict[str, float]]:
    """Tardiness of all instances over the least, less 1, by policy and by number of jobs.

    Sums are compared, as the least tardiness of single instances may be 0; "all" is over all rows.
    """
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        sizes = sums.setdefault(row.policy, {})
        for size in (str(row.num_jobs), "all"):
            got_s, least_s = sizes.get(size, (0.0, 0.0))
            sizes[size] = got_s + row.scores.tardiness_s, least_s + row.least_s
    return {
        policy: {
            size: got_s / least_s - 1.0 if least_s else float("nan")
            for size, (got_s, least_s) in sizes.items()
        }
        for policy, sizes in sums.items()
    }
