"""A batch of episodes of a scenario of requests."""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar

import numpy as np

from servegym.cluster.nominal import REFERENCE_BATCH, nominal_facts
from servegym.cluster.outcome import goodput_rps, latencies, within_slo
from servegym.cluster.spec import Episode
from servegym.envs.batch import Batch
from servegym.envs.settings import RequestSettings
from servegym.envs.shaping import CostToGo, Potentials
from servegym.scenario import Scenario, load_scenario
from servegym.typing import IntArray


class RequestBatch(Batch):
    """`num_envs` environments that play episodes of requests; see `Batch`.

    Args:
        num_envs: Environments.
        settings: What it was told.
    """

    episode_type = Episode
    objectives = ("latency", "goodput")
    rewarded = MappingProxyType({"tail": "latency"})
    metric_names: ClassVar[tuple[str, ...]] = (
        "mean_e2e_s",
        "mean_ttft_s",
        "slo_attainment",
        "goodput_rps",
        "num_rejected",
    )

    settings: RequestSettings

    @staticmethod
    def _load_scenario(name: str) -> Scenario:
        return load_scenario(name)

    def _draw(self, seed: int, load: float, number: int) -> Episode:
        num_requests = self.settings.num_requests
        return self.scenario.episode(seed, load=load, num_requests=num_requests)

    def _typical_reward(self) -> float:
        """Seconds of a mean request on a mean replica, shared; or its mean worth in goodput."""
        spec, table = self.scenario.spec, self.scenario.episode(0).table
        if self.objective == "goodput":
            weights = np.array([c.weight for c in spec.slo_classes])
            return float(weights[table.slo_class].mean())
        facts = nominal_facts(spec)
        rate, step_s, seq_s = (facts[:, i].mean() for i in (1, 2, 3))
        each_s = step_s + (REFERENCE_BATCH - 1) * seq_s
        return float(table.prompt_tokens.mean() / rate + table.output_tokens.mean() * each_s)

    def _potentials(self) -> Potentials:
        return CostToGo(self.num_envs, goodput=self.objective == "goodput", scale=self.reward_scale)

    def _arrivals(self) -> tuple[IntArray, IntArray]:
        env = self.simulator.state.env
        return env["num_arrived"], env["num_requests"]

    def summary(self, env: int) -> tuple[float, ...]:
        """Latencies and goodput of an ended episode, as `problems.request_metrics` has them.

        The first to arrive, in the warm-up, do not count, nor those that had not ended at a
        truncation.
        """
        done = self.simulator.judged(env)
        rows = np.argsort(done["arrival_s"], kind="stable")[self.settings.warmup :]
        done = done.take(rows[np.isfinite(done["finish_s"][rows])])
        if not len(done):
            return (0.0,) * 5
        ttft_s, _, e2e_s = latencies(done)
        served = ~done["rejected"]
        good = within_slo(done, self.scenario.spec)
        table = self.simulator.episodes[env].table
        return (
            float(e2e_s[served].mean()) if served.any() else 0.0,
            float(ttft_s[served].mean()) if served.any() else 0.0,
            float(good.mean()),
            float(np.nan_to_num(goodput_rps(done, good, table, self.settings.warmup))),
            float((~served).sum()),
        )
