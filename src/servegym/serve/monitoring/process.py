"""What Prometheus' own client reports of a Python process, under its names."""

from __future__ import annotations

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR

from servegym.serve.monitoring.prometheus import Exposition


def add_process(page: Exposition) -> None:
    """Write CPU, memory and open files (Linux only), garbage collections and Python's version."""
    for collector in (PROCESS_COLLECTOR, GC_COLLECTOR, PLATFORM_COLLECTOR):
        for family in collector.collect():
            samples = [(sample.labels, sample.value) for sample in family.samples]
            if family.type == "counter":
                page.counter(family.name, family.documentation, samples)
            else:
                page.gauges(family.name, family.documentation, samples)
