"""Clients that wait for their answers: a closed loop of a given number of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from servegym.typing import FloatArray
from servegym.workloads.mixtures import LengthConfig
from servegym.workloads.table import ANY_END, BY_ITSELF, RequestTable
from servegym.workloads.workload import Workload


class ClientsConfig(Workload):
    """`count` clients, each with one request at a time.

    A client sends its next request `think_s` after its last answer: seconds with a gamma
    distribution of that mean and the coefficient of variation `think_cv`, 0 for a constant, 1 for
    an exponential one. They share one list of requests, so that all of them have work until it is
    empty. A client begins at random within its first thinking. There is no rate: with R seconds
    an answer, they make `count / (R + think_s)` requests a second. Load multiplies the clients, to
    the nearest whole number; the requests are the same at every load.
    """

    kind: Literal["clients"] = "clients"
    count: int = Field(ge=1)
    think_s: float = Field(0.0, ge=0)
    think_cv: float = Field(1.0, ge=0)
    prompt: LengthConfig = LengthConfig()
    output: LengthConfig = LengthConfig(medians_tokens=(150.0,), max_tokens=2048)
    num_tenants: int = Field(1, ge=1)

    @property
    def pace(self) -> str:
        """What load 1 means."""
        return f"{self.count} clients"

    def clients_at(self, load: float) -> int:
        """Return the number of clients at a load, at least 1."""
        return max(1, round(self.count * load))

    def _draw(
        self, rng: np.random.Generator, num_requests: int, load: float
    ) -> tuple[RequestTable, None]:
        prompt, output = (part.draw(rng, num_requests) for part in (self.prompt, self.output))
        think_s = self._think(rng, num_requests)
        begun = rng.random(num_requests)
        tenant = rng.integers(0, self.num_tenants, num_requests)
        num = min(self.clients_at(load), num_requests)
        # if answers took no time, the clients together would send one every think_s / num
        later = np.arange(1, num_requests - num + 1) * (self.think_s / num)
        first = np.sort(begun[:num] * think_s[:num])
        waits = np.arange(num_requests) >= num
        return RequestTable.build(
            np.concatenate((first, first[-1] + later)),
            prompt,
            output,
            after=np.where(waits, ANY_END, BY_ITSELF),
            delay_s=np.where(waits, think_s, 0.0),
            tenant=tenant,
        ), None

    def _think(self, rng: np.random.Generator, num: int) -> FloatArray:
        """Draw times of thinking in seconds, `float64[num]`."""
        if self.think_s == 0 or self.think_cv == 0:
            return np.full(num, self.think_s)
        shape = self.think_cv**-2
        return rng.gamma(shape, self.think_s / shape, num)
