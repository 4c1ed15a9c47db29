"""Choosing the network to keep: by episodes that are neither trained nor judged on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from servegym.agents.network import DispatchNetwork
from servegym.agents.torch_policy import TorchPolicy
from servegym.cluster.outcome import worth_in_time
from servegym.cluster.simulator import Simulator
from servegym.policy.run import run
from servegym.scenario import Scenario
from servegym.typing import FloatArray

#: Seeds of validation episodes start here: beyond those of tuning, before the held-out ones.
FIRST_SEED = 500_000


class Validation:
    """The same episodes again and again, so that two networks are compared pair by pair."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        loads: Sequence[float],
        num_episodes: int = 16,
        num_requests: int = 1024,
    ) -> None:
        self._scenario = scenario
        self._episodes = [
            scenario.episode(
                FIRST_SEED + i, load=float(loads[i % len(loads)]), num_requests=num_requests
            )
            for i in range(num_episodes)
        ]

    def scores(self, network: DispatchNetwork) -> FloatArray:
        """Play greedily; lower is better.

        Returns:
            Per episode the logarithm of mean E2E latency in seconds, or minus what counts for
            goodput, per request, under the `goodput` objective, `float64[num_episodes]`.
        """
        simulator = Simulator(self._scenario.spec, self._episodes)
        network.eval()
        run(simulator, TorchPolicy(network))
        network.train()
        played = [simulator.outcomes(env) for env in range(len(self._episodes))]
        if self._scenario.objective == "goodput":
            spec = self._scenario.spec
            pairs = zip(played, self._episodes, strict=True)
            return np.array([-worth_in_time(x, spec, e.table) for x, e in pairs])
        return np.log([np.nanmean(x["finish_s"] - x["arrival_s"]) for x in played])
