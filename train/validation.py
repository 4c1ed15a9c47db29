"""Choosing the policy to keep: by episodes that are neither trained nor judged on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from servegym.cluster.outcome import worth_in_time
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import Episode
from servegym.policy.policy import Policy
from servegym.policy.run import run
from servegym.scenario import Scenario
from servegym.typing import FloatArray

#: Seeds of validation episodes start here: beyond those of tuning, before the held-out ones.
FIRST_SEED = 500_000


class Validated(NamedTuple):
    """What validation episodes say of a policy.

    The same episodes again and again, so that two policies are compared pair by pair.
    """

    scores: FloatArray  # [episodes] lower is better: logarithm of seconds, or minus a share
    objective: float  # mean over the episodes: seconds, or the share that is in time
    p99_s: float  # of the latencies of all episodes together

    @classmethod
    def of(
        cls, scores: FloatArray, latencies_s: Sequence[FloatArray], *, in_time: bool
    ) -> Validated:
        """Sum episodes up.

        Args:
            scores: Of each episode.
            latencies_s: Of all that was done in each; NaN for what was not.
            in_time: Whether scores are minus shares, not logarithms of seconds.
        """
        objective = -scores.mean() if in_time else np.exp(scores).mean()
        p99_s = np.nanpercentile(np.concatenate(latencies_s), 99)
        return cls(scores, float(objective), float(p99_s))

    @classmethod
    def joined(cls, parts: Sequence[Self], *, in_time: bool) -> Self:
        """Put several scenarios together; seconds count by their geometric means.

        Args:
            parts: Of each scenario.
            in_time: Whether scores are minus shares, not logarithms of seconds.
        """
        if len(parts) == 1:
            return parts[0]
        scores = np.concatenate([part.scores for part in parts])
        objective = -scores.mean() if in_time else np.exp(scores.mean())
        p99_s = np.exp(np.mean([np.log(part.p99_s) for part in parts]))
        return cls(scores, float(objective), float(p99_s))


def judged(scenario: Scenario, episodes: Sequence[Episode], policy: Policy) -> Validated:
    """Play episodes under a policy.

    Scores are logarithms of mean E2E latencies in seconds; of the 99th percentile of TTFT under the
    `tail` objective; or minus what counts for goodput, per request, under `goodput`.
    """
    simulator = Simulator(scenario.spec, list(episodes))
    run(simulator, policy)
    ends = [simulator.outcomes(env) for env in range(len(episodes))]
    latencies_s = [x["finish_s"] - x["arrival_s"] for x in ends]
    in_time = scenario.objective == "goodput"
    if in_time:
        pairs = zip(ends, episodes, strict=True)
        scores = np.array([-worth_in_time(x, scenario.spec, e.table) for x, e in pairs])
    elif scenario.objective == "tail":
        waits_s = [x["first_token_s"] - x["arrival_s"] for x in ends]
        scores = np.log([np.nanpercentile(x, 99) for x in waits_s])
    else:
        scores = np.log([np.nanmean(x) for x in latencies_s])
    return Validated.of(scores, latencies_s, in_time=in_time)


class Validation:
    """Validation episodes of requests that are dispatched."""

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

    def play(self, policy: Policy) -> Validated:
        """Play them; see `judged`."""
        return judged(self._scenario, self._episodes, policy)
