"""Filling the observation from the simulator's state."""

from __future__ import annotations

import numpy as np

from servegym.cluster.entry import INFER, SEE_ROLES
from servegym.cluster.jit import fixed, kernel
from servegym.cluster.kernels import measure
from servegym.cluster.router import see_prefixes
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    DISPATCH,
    OBSERVED_GENERATED,
    OBSERVED_KV_USAGE,
    OBSERVED_METRICS_AGE,
    OBSERVED_NUM_RUNNING,
    OBSERVED_NUM_WAITING,
    OBSERVED_PREFILLS,
    OBSERVED_SINCE_DISPATCH,
    PLACE,
    SCRAPED_EMITTED,
    SCRAPED_KV_USAGE,
    SCRAPED_RUNNING,
    SCRAPED_WAITING,
    Params,
    State,
)
from servegym.policy.contract import (
    EXPECTED_TOKENS,
    EXPECTED_TOKENS_SPREAD,
    INFERRED,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    Group,
)
from servegym.policy.inferred import infer
from servegym.policy.policy import Observations
from servegym.policy.roles import see_roles
from servegym.policy.what_if import fill_sampled, fill_what_if
from servegym.typing import FloatArray, IntArray

_METRICS = int(Group.METRICS)
_PREFIX = int(Group.PREFIX | Group.LIMITS)  # whom a prefill delays depends on how long it is
_INFERRED = int(INFERRED)
_ROLES = int(Group.ROLES)
_FAR_S = 1e6


@kernel
def observe(p: Params, s: State, e: int, needs: int, request_out: FloatArray) -> None:
    """Bring `s.observation[e]` up to date for the dispatch or placing that is due, and its request.

    Args:
        p: Constants.
        s: State; rows of `s.observation[e]` outside `needs` keep old values.
        e: Environment.
        needs: Feature groups to fill, bits of `Group`; the simulator has been `prepare`d for them.
        request_out: `float64[NUM_REQUEST_FEATURES]`.
    """
    env = s.env[e]
    i = env.deciding
    request = s.request[e, i]
    now_s = env.now_s
    rows = s.observation[e]
    num_replicas = env.num_replicas
    slo = p.slo_s[request.slo_class]
    request_out[0] = request.prompt
    request_out[1] = request.predicted
    request_out[2] = min(slo[0], _FAR_S)
    request_out[3] = min(slo[1], _FAR_S)
    request_out[4] = p.slo_weight[request.slo_class]
    request_out[5] = now_s - request.arrival_s
    request_out[6] = 1.0 / env.arrival_gap_s if env.arrival_gap_s > 0.0 else 0.0
    request_out[7] = env.num_up
    request_out[8] = env.num_held
    if needs & _METRICS:
        fresh = p.metrics_interval_s == 0.0
        age = 0.0 if fresh else now_s - env.last_scrape_s
        scraped = s.scraped[e]
        for r in range(num_replicas):
            if fresh:
                measure(p, s, e, r, now_s, s.scraped)
            rows[OBSERVED_NUM_RUNNING, r] = scraped[SCRAPED_RUNNING, r]
            rows[OBSERVED_NUM_WAITING, r] = scraped[SCRAPED_WAITING, r]
            rows[OBSERVED_KV_USAGE, r] = scraped[SCRAPED_KV_USAGE, r]
            rows[OBSERVED_GENERATED, r] = scraped[SCRAPED_EMITTED, r]
            rows[OBSERVED_METRICS_AGE, r] = age
            since = now_s - s.replica[e, r].last_dispatch_s
            rows[OBSERVED_SINCE_DISPATCH, r] = min(since, _FAR_S)
    if needs & _PREFIX and p.prefix_caching:
        see_prefixes(p, s, e, i, now_s)
    if needs & _INFERRED:
        if p.entries[INFER] == 0:  # nobody has prepared for it: say so as far as a kernel can
            request_out[EXPECTED_TOKENS] = np.nan
        else:
            infer(p, s, e, needs)
            request_out[EXPECTED_TOKENS] = s.length[e, i].expected
        request_out[EXPECTED_TOKENS_SPREAD] = env.expected_spread
    if needs & _ROLES:
        if p.entries[SEE_ROLES] == 0:
            rows[OBSERVED_PREFILLS, 0] = np.nan
        else:
            see_roles(p, s, e)


@kernel
def _observe_all(
    p: Params, s: State, envs: IntArray, needs: int, replicas: FloatArray, request: FloatArray
) -> None:
    for row in range(envs.shape[0]):
        observe(p, s, envs[row], needs, request[row])
        seen = s.observation[envs[row]]
        for f in range(seen.shape[0]):
            for r in range(seen.shape[1]):
                replicas[row, f, r] = seen[f, r]


def prepare(simulator: Simulator, needs: Group) -> None:
    """See to it that `observe` can fill groups of features, before the episodes begin.

    What is inferred is compiled only for who asks for it, and rests on what has been watched since.
    What there is of roles is compiled only for who asks, too.
    """
    if needs & INFERRED:
        simulator.require(INFER)
    if needs & Group.ROLES:
        simulator.require(SEE_ROLES)


def observe_batch(simulator: Simulator, needs: Group) -> tuple[Observations, IntArray]:
    """Observe every dispatch or placing that is due.

    Args:
        simulator: After `advance`.
        needs: Feature groups to fill.

    Returns:
        The observations and the environment of each row, `int64[batch]`.
    """
    prepare(simulator, needs)
    decision = simulator.state.env["decision"]
    envs = np.flatnonzero((decision == DISPATCH) | (decision == PLACE))
    width = simulator.max_replicas
    replicas = np.empty((len(envs), NUM_REPLICA_FEATURES, width))
    request = np.zeros((len(envs), NUM_REQUEST_FEATURES))
    if needs & Group.WHAT_IF:
        fill = fill_sampled if needs & Group.SAMPLED else fill_what_if
        for env in envs.tolist():
            fill(simulator, env)
    arguments = simulator.params, simulator.state, envs, int(needs), replicas, request
    fixed(_observe_all, *arguments)(*arguments)
    return Observations(replicas, request, simulator.state.allowed[envs]), envs
