"""How far rules are from the best known schedules of job-shop benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from servegym.baselines.workflow.cp_sat import cp_sat
from servegym.baselines.workflow.registry import EXACT_RULES, WorkflowRule
from servegym.workflow.taillard import TaillardInstance


class JobShopRow(NamedTuple):
    """One policy on one instance.

    Attributes:
        instance: Name of the instance.
        size: Jobs times machines.
        policy: Name of the policy.
        makespan_s: Of its schedule.
        gap: Makespan over the best known one, less 1.
        mean_flow_s: Mean finish of the jobs.
        status: "optimal" where the policy proved it.
        bound_s: Lower bound that the policy proved; None for all but solvers.
        elapsed_s: Wall time it took.
    """

    instance: str
    size: str
    policy: str
    makespan_s: float
    gap: float
    mean_flow_s: float
    status: str
    bound_s: float | None
    elapsed_s: float


def job_shop_gaps(
    instances: Iterable[TaillardInstance],
    policies: Mapping[str, WorkflowRule],
    cp_sat_time_limit_s: float = 10.0,
) -> Iterator[JobShopRow]:
    """Schedule instances with policies, one row each, as they are done.

    Args:
        instances: Benchmarks with a best known makespan.
        policies: Rules, solvers or learned schedulers by name.
        cp_sat_time_limit_s: For each instance, if `cp-sat` is among the policies.
    """
    limited = {
        name: partial(cp_sat, time_limit_s=cp_sat_time_limit_s) if name in EXACT_RULES else policy
        for name, policy in policies.items()
    }
    for instance in instances:
        shop = instance.workflow()
        for name, policy in limited.items():
            begin_s = time.perf_counter()
            schedule = policy(shop)
            yield JobShopRow(
                instance=instance.name,
                size=instance.size,
                policy=name,
                makespan_s=schedule.makespan_s,
                gap=schedule.makespan_s / instance.upper_bound_s - 1.0,
                mean_flow_s=schedule.mean_flow_s,
                status=schedule.status,
                bound_s=schedule.bound_s,
                elapsed_s=time.perf_counter() - begin_s,
            )


def mean_gaps(rows: Iterable[JobShopRow]) -> dict[str, dict[str, float]]:
    """Average gaps by policy and by size, in order of appearance; size "all" is over all rows."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        sizes = found.setdefault(row.policy, {})
        for size in (row.size, "all"):
            sizes.setdefault(size, []).append(row.gap)
    return {
        policy: {size: float(np.mean(gaps)) for size, gaps in sizes.items()}
        for policy, sizes in found.items()
    }
