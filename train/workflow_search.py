"""What the search for the linear part of a learned scheduler of jobs begins with and goes by.

A linear score of the pair features is a policy of some thirty numbers, and an episode of a hundred
jobs takes some 50 ms in compiled code: few enough and fast enough to search without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from servegym.agents.workflow_features import NUM_PAIR_FEATURES, PAIR_FEATURES
from servegym.agents.workflow_policy import WorkflowWeights, learned_rule
from servegym.train.search import Search
from servegym.train.validation import Validated
from servegym.typing import FloatArray
from servegym.workflow.online.policy import WorkflowPolicy
from servegym.workflow.online.run import run
from servegym.workflow.online.simulator import Simulator
from servegym.workflow.online.spec import Episode, FleetSpec

#: Where a search without a base rule begins: short jobs first, on devices that end them early, and
#: rather not where a prompt holds up others; the last three are 0 on devices that run tasks.
FIRST_GUESS = {
    "one": 10.0,
    "job_work_left": -1.0,
    "rank": 0.1,
    "finish": -0.5,
    "regret": -1.0,
    "prefill_to_others": -1.0,
    "prompts_waiting": -0.5,
    "kv_used": -0.5,
}


def validated(
    spec: FleetSpec, episodes: Sequence[Episode], policy: WorkflowPolicy, objective: str
) -> Validated:
    """Play episodes.

    Args:
        spec: The fleet.
        episodes: What is played.
        policy: Plays.
        objective: One of `OBJECTIVES`.

    Returns:
        Scores are logarithms of mean job completion times or of makespans in seconds, or minus
        (weighted) shares of jobs that ended in time; latencies are job completion times.
    """
    simulator = Simulator(spec, episodes)
    run(simulator, policy)
    jobs = [simulator.jobs(e) for e in range(len(episodes))]
    latencies_s = [x["finish_s"] - x["arrival_s"] for x in jobs]
    scores = _scores(simulator, objective)
    return Validated.of(scores, latencies_s, in_time=objective == "deadline")


def losses(
    spec: FleetSpec, episodes: Sequence[Episode], policy: WorkflowPolicy, objective: str
) -> FloatArray:
    """Play episodes; return the scores alone, see `validated`, `float64[len(episodes)]`."""
    simulator = Simulator(spec, episodes)
    run(simulator, policy)
    return _scores(simulator, objective)


def _scores(simulator: Simulator, objective: str) -> FloatArray:
    env = simulator.state.env
    if objective == "jct":
        return np.log(env["area"] / env["num_jobs"])
    if objective == "makespan":
        return np.log(env["makespan_s"])
    weights = [simulator.jobs(e)["weight"].sum() for e in range(simulator.num_envs)]
    return -env["good"] / np.array(weights)


def time_unit_s(spec: FleetSpec, episodes: Sequence[Episode]) -> float:
    """Return the mean expected duration of the stages of some episodes."""
    simulator = Simulator(spec, episodes)
    counts = simulator.state.env["num_stages"].tolist()
    means = [simulator.state.stage["mean_s"][env, :n] for env, n in enumerate(counts)]
    return float(np.concatenate(means).mean())


def first_search(base: str) -> Search:
    """Begin to search at the base rule, or, without one, at the first guess."""
    mean = np.zeros(NUM_PAIR_FEATURES)
    spread = np.full(NUM_PAIR_FEATURES, 0.5)
    if base == "none":
        for name, value in FIRST_GUESS.items():
            mean[PAIR_FEATURES.index(name)] = value
    spread[PAIR_FEATURES.index("one")] = 2.0
    return Search(mean, spread)


def linear_loss(
    spec: FleetSpec,
    episodes: Sequence[Episode],
    objective: str,
    base: str,
    eta: float,
    tau_s: float,
) -> Callable[[FloatArray], float]:
    """Return the mean loss of a linear policy over these episodes, as a function of its weights."""

    def loss(theta: FloatArray) -> float:
        policy = learned_rule(WorkflowWeights(base, eta, tau_s, theta))
        return float(losses(spec, episodes, policy, objective).mean())

    return loss
