"""A batch of episodes of a scenario of requests."""

from __future__ import annotations

from typing import Any, ClassVar

from servegym.cluster.outcome import latencies, within_slo
from servegym.cluster.spec import Episode
from servegym.envs.batch import Batch
from servegym.scenario import Scenario, load_scenario


class RequestBatch(Batch):
    """`num_envs` environments that play episodes of requests; see `Batch`.

    Args:
        num_envs: Environments.
        scenario: A name, a path or a `Scenario`.
        num_requests: Requests of an episode; the scenario's if not given.
        settings: See `Batch`.
    """

    episode_type = Episode
    objectives = ("latency", "goodput")
    metric_names: ClassVar[tuple[str, ...]] = (
        "mean_e2e_s",
        "mean_ttft_s",
        "slo_attainment",
        "goodput_rps",
        "num_rejected",
    )

    def __init__(
        self,
        num_envs: int,
        scenario: Scenario | str,
        *,
        num_requests: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(num_envs, scenario, **settings)
        self._num_requests = num_requests

    @staticmethod
    def _load_scenario(name: str) -> Scenario:
        return load_scenario(name)

    def _draw(self, seed: int, load: float, number: int) -> Episode:
        return self.scenario.episode(seed, load=load, num_requests=self._num_requests)

    def summary(self, env: int) -> tuple[float, ...]:
        """Latencies and goodput of an episode that has ended, as `evaluate.metrics` has them."""
        done = self.simulator.outcomes(env)
        ttft_s, _, e2e_s = latencies(done)
        served = ~done["rejected"]
        good = within_slo(done, self.scenario.spec)
        span_s = float(done["arrival_s"].max() - done["arrival_s"].min())
        return (
            float(e2e_s[served].mean()) if served.any() else 0.0,
            float(ttft_s[served].mean()) if served.any() else 0.0,
            float(good.mean()),
            float(good.sum() / span_s) if span_s > 0 else 0.0,
            float((~served).sum()),
        )
