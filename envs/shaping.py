"""Shaped rewards: each decision is charged what it adds to the cost of the requests in the system.

A reward of minus the requests in the system says little about the decision just taken: its effect
comes over the seconds that follow, spread over hundreds of later decisions. The shaped reward adds
the change of a potential of the state (Ng, Harada and Russell 1999): what the requests at the
replicas are estimated to earn still, if nothing else arrives. The sum over an episode stays what it
was, but for the potential at its ends, and 0 is the potential of an empty system.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.state import (
    DECODE,
    OBSERVED_PREFILL_RATE,
    PREFILL,
    STEP,
    Params,
    State,
)
from servegym.cluster.steptime import decode_span_s
from servegym.typing import BoolArray, FloatArray, IntArray

#: A request is expected within a limit with a chance that falls from 1 to 0 between these shares
#: of it: prefills that arrive later stretch what is estimated without them.
_SAFE, _LOST = 0.5, 1.5


class Memory(NamedTuple):
    """Working memory of one thread: requests of a replica, or jobs."""

    left: FloatArray  # output tokens, or seconds of work, to come
    wait_s: FloatArray  # to the first token, -1: it is out; or to the end if nobody else were there
    who: IntArray  # number of the request or job


@inlined
def sort_by_left(m: Memory, count: int) -> None:
    """Order the first `count` by what is left: Shell's sort, since Numba's needs its runtime."""
    gap = count // 2
    while gap > 0:
        for i in range(gap, count):
            left, wait_s, who = m.left[i], m.wait_s[i], m.who[i]
            j = i
            while j >= gap and m.left[j - gap] > left:
                m.left[j], m.wait_s[j], m.who[j] = (
                    m.left[j - gap],
                    m.wait_s[j - gap],
                    m.who[j - gap],
                )
                j -= gap
            m.left[j], m.wait_s[j], m.who[j] = left, wait_s, who
        gap = 1 if gap == 2 else int(gap / 2.2)


@inlined
def _share_over(s: State, e: int, r: int) -> float:
    """Share of the step or stretch in progress that is over."""
    v = s.replica[e, r]
    if v.mode != DECODE and v.mode != STEP and v.mode != PREFILL:
        return 0.0
    length_s = s.due[e, v.event_pos].time_s - v.stretch_begin_s
    if not length_s > 0.0:
        return 0.0
    return min(1.0, max(0.0, (s.env[e].now_s - v.stretch_begin_s) / length_s))


@inlined
def chance_below(value: float, limit: float) -> float:
    """Chance that what is estimated to be `value` keeps within a limit."""
    return min(1.0, max(0.0, (_LOST - value / limit) / (_LOST - _SAFE)))


@inlined
def _chance_within(p: Params, s: State, e: int, request: int, wait_s: float, end_s: float) -> float:
    """Estimated chance that a request that ends `end_s` from now is within its limits."""
    q = s.request[e, request]
    now_s = s.env[e].now_s
    ttft_s, tpot_s = p.slo_s[q.slo_class, 0], p.slo_s[q.slo_class, 1]
    if wait_s < 0.0:
        if q.first_token_s - q.arrival_s > ttft_s:
            return 0.0
        chance = 1.0
        decoded_s = now_s + end_s - q.first_token_s
    else:
        chance = chance_below(now_s + wait_s - q.arrival_s, ttft_s)
        decoded_s = end_s - wait_s
    if q.output > 1:
        chance *= chance_below(decoded_s / (q.output - 1), tpot_s)
    return chance


@inlined
def _to_come(p: Params, s: State, e: int, r: int, goodput: bool, m: Memory) -> float:
    """Estimate what the requests of a replica will still earn.

    All of them share the engine: prefills come first and delay everyone, then all decode together
    in steps whose length grows with their number, until one after the other has its tokens. Step
    times are the replica's own, at the present number of requests and at half their tokens to come.
    """
    v = s.replica[e, r]
    share = _share_over(s, e, r)
    ended = 0.0 if v.mode == PREFILL else share * v.stretch_steps
    rate = s.observation[e, OBSERVED_PREFILL_RATE, r]
    count = 0
    prefill_s, context = 0.0, 0.0
    for queued in range(2):
        request = v.wait_head if queued else v.run_head
        while request >= 0:
            q = s.request[e, request]
            left = float(q.output - q.generated)
            if q.join_iter >= 0:
                left = max(0.0, left - (v.iteration - q.join_iter) - ended)
            else:
                left = max(0.0, left - 1.0)  # its prefill gives one
                done = q.hit_hint if queued else q.computed + share * q.chunk
                prefill_s += max(0.0, q.prompt + q.generated - done) / rate
            m.left[count] = left
            m.who[count] = request
            m.wait_s[count] = prefill_s if math.isnan(q.first_token_s) else -1.0
            context += q.prompt + q.output - 0.5 * left
            count += 1
            request = q.next_request
    if count == 0:
        return 0.0
    kv_tokens = int(context)
    first_s = decode_span_s(p, v.type_idx, 1, kv_tokens // count, 1) / v.speed
    all_s = decode_span_s(p, v.type_idx, count, kv_tokens, 1) / v.speed
    seq_s = (all_s - first_s) / max(1, count - 1)
    sort_by_left(m, count)
    total, end_s, before = 0.0, prefill_s, 0.0
    for i in range(count):
        end_s += (m.left[i] - before) * (first_s + seq_s * (count - i - 1))
        before = m.left[i]
        if goodput:
            weight = p.slo_weight[s.request[e, m.who[i]].slo_class]
            total += weight * _chance_within(p, s, e, m.who[i], m.wait_s[i], end_s)
        else:
            total -= end_s
    return total


@kernel
def potential(p: Params, s: State, e: int, goodput: bool, m: Memory) -> float:
    """Estimate what all requests at the replicas of an environment will still earn."""
    total = 0.0
    for r in range(s.env[e].num_replicas):
        total += _to_come(p, s, e, r, goodput, m)
    return total


@kernel
def shape_range(
    p: Params,
    s: State,
    goodput: bool,
    m: Memory,
    first: int,
    stop: int,
    active: BoolArray,
    ended: BoolArray,
    scale: float,
    value: FloatArray,
    reward: FloatArray,
) -> None:
    """Add the change of the potential to the rewards of `first..stop-1`, where active."""
    for e in range(first, stop):
        if active[e]:
            new = 0.0 if ended[e] else potential(p, s, e, goodput, m)
            reward[e] += (new - value[e]) / scale
            value[e] = new


def memory(most: int) -> Memory:
    """Make working memory for one thread."""
    return Memory(np.empty(most), np.empty(most), np.empty(most, np.int64))


class Potentials(ABC):
    """Potentials of a batch of environments, and how they shape rewards.

    Args:
        num_envs: Environments.
        scale: Divides rewards.

    Attributes:
        value: Potential of each environment's state, before it is scaled, `float64[num_envs]`.
    """

    def __init__(self, num_envs: int, *, scale: float) -> None:
        self.value: FloatArray = np.zeros(num_envs)
        self._scale = scale

    @abstractmethod
    def _of(self, p: Any, s: Any, env: int) -> float:
        """Estimate what is still earned in one environment."""

    @abstractmethod
    def _shape(self, p: Any, s: Any, *step: Any) -> None:
        """Shape a step; `step` is what kernels such as `shape_range` take last."""

    def begin(self, simulator: Any, env: int) -> None:
        """Note the potential of an environment that has begun an episode."""
        self.value[env] = self._of(simulator.params, simulator.state, env)

    def add(
        self,
        simulator: Any,
        first: int,
        stop: int,
        active: BoolArray,
        ended: BoolArray,
        reward: FloatArray,
    ) -> None:
        """Shape the rewards of a step of the environments `first..stop-1`.

        Args:
            simulator: After the step.
            first: First environment.
            stop: One past the last.
            active: Which took part, `bool[num_envs]`.
            ended: Where everything has ended, `bool[num_envs]`; a truncated episode has not.
            reward: Rewards, changed in place, `float[num_envs]`.
        """
        step = (first, stop, active, ended, self._scale, self.value, reward)
        self._shape(simulator.params, simulator.state, *step)


class CostToGo(Potentials):
    """Potentials of a batch of environments of requests; see `Potentials`.

    Args:
        num_envs: Environments.
        goodput: Whether requests within their limits are rewarded, else times in the system are.
        scale: Divides rewards.
    """

    def __init__(self, num_envs: int, *, goodput: bool, scale: float) -> None:
        super().__init__(num_envs, scale=scale)
        self._goodput = goodput

    def _of(self, p: Params, s: State, env: int) -> float:
        return float(potential(p, s, env, self._goodput, memory(s.request.shape[1])))

    def _shape(self, p: Params, s: State, *step: Any) -> None:
        shape_range(p, s, self._goodput, memory(s.request.shape[1]), *step)
