"""Time the DAG schedulers: `python benchmarks/heft.py`.

Graphs have about 4 edges a task. The time is that of scheduling alone: the workflow is made before
(its time is in the last column), and kernels are compiled by a small graph first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from servegym.baselines.workflow.registry import DAG_RULES
from servegym.workflow.generate import RandomDag

SIZES = (100, 1_000, 4_000, 16_000)
REPETITIONS = 7


def median_ms(call: Callable[[], object]) -> float:
    """Median wall time of a few calls, in milliseconds."""
    times = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


def main() -> None:
    """Print a table in Markdown."""
    small = RandomDag(num_tasks=20, num_devices=16).sample(0)
    for rule in DAG_RULES.values():
        rule(small)
    print("| tasks x devices |", *(f"{name} |" for name in DAG_RULES), "making |")
    print("|---" * (len(DAG_RULES) + 2) + "|")
    for size in SIZES:
        generator = RandomDag(num_tasks=size, num_devices=16)
        workflow = generator.sample(1)
        cells = [f"{median_ms(partial(rule, workflow)):.2f}" for rule in DAG_RULES.values()]
        making = f"{median_ms(partial(generator.sample, 1)):.0f}"
        print(f"| {size:,} x 16 |", *(f"{cell} |" for cell in cells), f"{making} |")


if __name__ == "__main__":
    main()
