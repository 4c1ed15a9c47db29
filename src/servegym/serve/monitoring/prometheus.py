"""Counters, gauges and histograms in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: A value and the labels it has besides those of the page.
Samples = Iterable[tuple[Mapping[str, str], float]]


class Histogram:
    """Counts of values up to fixed bounds.

    Args:
        bounds: Upper bounds, ascending; one more bin is open.

    Attributes:
        bounds: As given.
        total: Sum of the values.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self._counts)

    def observe(self, value: float, count: int = 1) -> None:
        """Count a value, as often as it occurred."""
        self._counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def add(self, other: Histogram) -> None:
        """Count what another histogram of the same bounds has counted."""
        assert self.bounds == other.bounds
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.total += other.total

    def quantile(self, share: float) -> float:
        """Return the bound below which a share of the values lies; 0.0 without values."""
        wanted = share * self.count
        for bound, count in zip(self.bounds, accumulate(self._counts), strict=False):
            if count >= wanted:
                return bound if wanted else 0.0
        return float("inf")

    def cumulative(self) -> list[tuple[str, int]]:
        """Return bounds as Prometheus writes them, with the number of values up to each."""
        names = [*(f"{bound:.10g}" for bound in self.bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


def observe_all(histograms: Iterable[Histogram], value: float, count: int = 1) -> None:
    """Count a value in several histograms of the same bounds, as often as it occurred."""
    place = -1
    for histogram in histograms:
        if place < 0:
            place = bisect_left(histogram.bounds, value)
        histogram._counts[place] += count
        histogram.total += value * count


class Exposition:
    """A page of metrics, written line by line.

    Args:
        labels: On every sample.
    """

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        self._labels = dict(labels or {})
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, value: float, **labels: str) -> None:
        """Add a gauge with one sample."""
        self.gauges(name, text, [(labels, value)])

    def gauges(self, name: str, text: str, values: Samples) -> None:
        """Add a gauge with a sample for each set of further labels."""
        self._head(name, text, "gauge")
        for labels, value in values:
            self._sample(name, value, labels)

    def counter(self, name: str, text: str, values: Samples) -> None:
        """Add a counter with a sample for each set of further labels; `_total` is appended."""
        self._head(f"{name}_total", text, "counter")
        for labels, value in values:
            self._sample(f"{name}_total", value, labels)

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        """Add a histogram with its buckets, count and sum."""
        self.histograms(name, text, [({}, histogram)])

    def histograms(
        self, name: str, text: str, values: Iterable[tuple[Mapping[str, str], Histogram]]
    ) -> None:
        """Add a histogram for each set of further labels."""
        self._head(name, text, "histogram")
        for labels, histogram in values:
            pairs = self._pairs(labels)  # once: a page has thousands of buckets
            begin = f"{name}_bucket{{{pairs},le=" if pairs else f"{name}_bucket{{le="
            for bound, count in histogram.cumulative():
                self._lines.append(f'{begin}"{bound}"}} {count}.0')
            self._sample(f"{name}_count", histogram.count, labels)
            self._sample(f"{name}_sum", histogram.total, labels)

    def page(self) -> str:
        """Return the text of all series added so far."""
        return "\n".join(self._lines) + "\n"

    def _head(self, name: str, text: str, kind: str) -> None:
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]

    def _sample(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        pairs = self._pairs(labels)
        self._lines.append(
            f"{name}{{{pairs}}} {float(value)!r}" if pairs else f"{name} {float(value)!r}"
        )

    def _pairs(self, labels: Mapping[str, str]) -> str:
        return ",".join(f'{k}="{_escaped(v)}"' for k, v in {**self._labels, **labels}.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
