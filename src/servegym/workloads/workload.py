"""What every kind of workload is: a stream of requests that a seed draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from servegym.typing import BoolArray, Int32Array
from servegym.workloads.classes import draw_classes
from servegym.workloads.mixtures import WorkloadPart
from servegym.workloads.table import RequestTable


class Workload(WorkloadPart, ABC):
    """A kind of workload: it draws requests, and for those that say none SLO classes."""

    @property
    @abstractmethod
    def pace(self) -> str:
        """What load 1 means."""

    def table(
        self,
        rng: np.random.Generator,
        *,
        num_requests: int,
        load: float = 1.0,
        class_shares: Sequence[float] = (1.0,),
    ) -> RequestTable:
        """Draw a stream.

        Args:
            rng: Randomness.
            num_requests: Requests; a trace may have fewer.
            load: Multiplies what `pace` says.
            class_shares: Shares of the SLO classes, drawn by conversation.
        """
        stream, given = self._draw(rng, num_requests, load)
        drawn = draw_classes(rng, stream, class_shares)
        slo_class = drawn if given is None else np.where(given, stream.slo_class, drawn)
        return replace(stream, slo_class=slo_class, tenant=self._tenants(rng, stream))

    @abstractmethod
    def _draw(
        self, rng: np.random.Generator, num_requests: int, load: float
    ) -> tuple[RequestTable, BoolArray | None]:
        """Draw requests, and say which of them have SLO classes, `bool[n]`; None: none has."""

    def _tenants(self, rng: np.random.Generator, stream: RequestTable) -> Int32Array:
        """Draw the tenants of requests that have none yet, `int32[n]`."""
        return stream.tenant
