"""The exact least total tardiness on one machine, by decomposition (Lawler 1977)."""

from __future__ import annotations

import numpy as np

from servegym.baselines.workflow.sequence import run_in_order
from servegym.errors import ConfigError
from servegym.typing import FloatArray
from servegym.workflow.graph import Workflow
from servegym.workflow.schedule import Schedule
from servegym.workflow.tardiness import due_dates_of, require_due_dates, require_single_machine

#: Each job may open a level of the recursion; 100 jobs take about 0.1 s at worst.
MAX_JOBS = 250


def lawler(workflow: Workflow) -> Schedule:
    """Find an order of least total tardiness; `status` "optimal" is about that.

    Sort jobs by due date. In some best order the longest job has just the jobs before it in that
    sequence and some of those that follow it there ahead of it: each number of them splits the
    jobs in two smaller problems. Numbers that cannot be best are left out by two conditions
    (Potts and Van Wassenhove 1982; Szwarc, Grosso and Della Croce 2001).

    Raises:
        ConfigError: If weights differ, for which this does not hold, or there are too many jobs.
    """
    work_s = require_single_machine(workflow, "lawler")
    require_due_dates(workflow, "lawler")
    due_s, weight = due_dates_of(workflow)
    if (weight != weight[0]).any():
        raise ConfigError("lawler needs equal weights: use mdd+ls, or leave the weights out")
    if workflow.num_tasks > MAX_JOBS:
        raise ConfigError(f"lawler takes at most {MAX_JOBS} jobs, got {workflow.num_tasks}")
    by_due = np.lexsort((work_s, due_s))
    order = _Decomposition(work_s[by_due], due_s[by_due]).order()
    return run_in_order(workflow, by_due[list(order)], status="optimal")


class _Decomposition:
    """Jobs by due date, and the least tardiness of every part of them met so far."""

    def __init__(self, work_s: FloatArray, due_s: FloatArray) -> None:
        self.work_s: list[float] = work_s.tolist()
        self.due_s: list[float] = due_s.tolist()
        self.found: dict[tuple[tuple[int, ...], float], tuple[float, tuple[int, ...]]] = {}

    def order(self) -> tuple[int, ...]:
        return self._best(tuple(range(len(self.work_s))), 0.0)[1]

    def _best(self, jobs: tuple[int, ...], start_s: float) -> tuple[float, tuple[int, ...]]:
        """Least tardiness of jobs that run from `start_s` on, and their order."""
        if not jobs:
            return 0.0, ()
        if (jobs, start_s) not in self.found:
            self.found[jobs, start_s] = self._split(jobs, start_s)
        return self.found[jobs, start_s]

    def _split(self, jobs: tuple[int, ...], start_s: float) -> tuple[float, tuple[int, ...]]:
        work_s, due_s = self.work_s, self.due_s
        place = max(range(len(jobs)), key=lambda i: (work_s[jobs[i]], i))
        longest = jobs[place]
        end_s = start_s + sum(work_s[v] for v in jobs[:place])
        ahead_s = 0.0  # due date plus duration of the jobs that overtake the longest
        least, order = np.inf, jobs
        for k in range(place, len(jobs)):
            end_s += work_s[jobs[k]]
            if k > place:
                ahead_s = max(ahead_s, due_s[jobs[k]] + work_s[jobs[k]])
            if end_s < ahead_s or (k + 1 < len(jobs) and end_s >= due_s[jobs[k + 1]]):
                continue
            own_s = max(0.0, end_s - due_s[longest])
            before_s, before = self._best(jobs[:place] + jobs[place + 1 : k + 1], start_s)
            if before_s + own_s >= least:
                continue
            after_s, after = self._best(jobs[k + 1 :], end_s)
            if before_s + own_s + after_s < least:
                least, order = before_s + own_s + after_s, (*before, longest, *after)
        return float(least), order
