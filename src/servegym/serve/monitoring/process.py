"""What Prometheus' own client reports of a Python process, under its names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    Metric,
    ProcessCollector,
)

from servegym.serve.monitoring.prometheus import Exposition


def add_process(page: Exposition) -> None:
    """Write CPU, memory and open files (Linux only), garbage collections and Python's version."""
    for collector in (PROCESS_COLLECTOR, GC_COLLECTOR, PLATFORM_COLLECTOR):
        for family in collector.collect():
            samples = [(sample.labels, sample.value) for sample in family.samples]
            _add(page, family, samples)


def add_workers(page: Exposition, pids: Iterable[int]) -> None:
    """Write the same of other processes of this user, which Linux tells of them.

    Args:
        page: To write on.
        pids: Of the processes.
    """
    families: dict[str, Metric] = {}
    samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for pid in sorted(set(pids)):
        one = ProcessCollector("servegym_worker", pid=lambda pid=pid: pid, registry=None)  # type: ignore[misc]
        for family in one.collect():
            families[family.name] = family
            samples[family.name] += [({"pid": str(pid)}, s.value) for s in family.samples]
    for name, family in families.items():
        _add(page, family, samples[name])


def _add(page: Exposition, family: Metric, samples: list[tuple[dict[str, str], float]]) -> None:
    if family.type == "counter":
        page.counter(family.name, family.documentation, samples)
    else:
        page.gauges(family.name, family.documentation, samples)
