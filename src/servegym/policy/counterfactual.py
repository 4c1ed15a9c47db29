"""What each choice of a dispatch does: all of them tried on one state, over the same futures.

A teacher's knowledge, not a policy's: it looks at the engines themselves and at the speed they have
now. Of what is still to come it knows no more than a policy: how long outputs are is drawn from
what their predictions and the tokens that are out say of them, the same for every choice, and
nobody arrives any more.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import inlined, kernel
from servegym.cluster.rng import mix64, uniform
from servegym.cluster.simulator import Simulator
from servegym.cluster.state import (
    DISPATCH,
    OBSERVED_KV_CAPACITY,
    OBSERVED_OUTSTANDING,
    OBSERVED_PREFILL_RATE,
    Params,
    State,
)
from servegym.policy.drawn_lengths import Lengths, draw_output
from servegym.policy.dry_run import Copied, Scratch, list_requests, run_dry, step_left_s
from servegym.typing import FloatArray, IntArray


class Worth(NamedTuple):
    """How choices are valued.

    A second that a request takes costs `second`; a request within its limits brings its weight.
    It counts as within them by degrees, as what it takes from now on will be longer than foreseen:
    those who arrive later slow it down.
    """

    num_samples: int  # futures for each decision
    second: float  # what a second costs that is added to somebody's time
    in_time: float  # what a request within its limits brings, times its weight
    stretch: float  # what is foreseen of a request's times, times this
    softness: float  # share of a limit by which one must stay below it to be rather sure of it
    prefix_price: float  # of uncached prefill, per second and request there; if it has a prefix
    prefill_price: float = 0.0  # of uncached prefill, per second and request there
    memory_price: float = 0.0  # of all KV memory of a replica, per second and request there
    sees_speed: bool = True  # knows how fast a replica is now, not only how fast it should be


#: Where seconds are what counts.
SECONDS = Worth(num_samples=4, second=1.0, in_time=0.0, stretch=1.0, softness=0.1, prefix_price=1.0)
#: Where being within limits is.
LIMITS = Worth(
    num_samples=4, second=0.005, in_time=1.0, stretch=1.5, softness=0.2, prefix_price=1.0
)


def worth_of(objective: str) -> Worth:
    """Return how choices are valued under a scenario's objective."""
    return LIMITS if objective == "goodput" else SECONDS


@inlined
def _sure(time_s: float, limit_s: float, softness: float) -> float:
    """How sure it is that a time stays within its limit, 0 to 1."""
    if not limit_s < math.inf:
        return 1.0
    return 1.0 / (1.0 + math.exp(min(50.0, (time_s / limit_s - 1.0) / softness)))


@inlined
def _in_time(
    p: Params, s: State, e: int, w: Worth, c: Copied, count: int, begin_s: float, scratch: State
) -> float:
    """Weight of those that will be within their limits, as far as that is sure.

    Args:
        p: Constants.
        s: State.
        e: Environment.
        w: How choices are valued.
        c: Requests of an engine.
        count: How many of them have been run dry in the scratch environment.
        begin_s: From now to where it began, seconds.
        scratch: The scratch environment.
    """
    now_s = s.env[e].now_s
    total = 0.0
    for slot in range(count):
        source, q = s.request[e, c.source[slot]], scratch.request[0, slot]
        limits_s = p.slo_s[source.slo_class]
        first_s = source.first_token_s
        if math.isnan(first_s):
            ahead_s = begin_s if c.generated[slot] > 0 else begin_s + q.first_token_s
            first_s = now_s + w.stretch * ahead_s
            sure = _sure(first_s - source.arrival_s, limits_s[0], w.softness)
        else:
            sure = 1.0 if first_s - source.arrival_s <= limits_s[0] else 0.0
        end_s = now_s + w.stretch * (begin_s + q.finish_s)
        tokens = c.generated[slot] + q.output
        if tokens > 1:
            sure *= _sure((end_s - first_s) / (tokens - 1), limits_s[1], w.softness)
        total += p.slo_weight[source.slo_class] * sure
    return total


@inlined
def _mixed(key: int, n: int) -> int:
    """Make another key of a key and a number."""
    mixed = mix64(mix64(np.uint64(key)) ^ np.uint64(n))
    return np.int64(mixed)  # type: ignore[return-value]


@inlined
def _draw(lengths: Lengths, s: State, e: int, key: int, share: float, c: Copied, slot: int) -> None:
    """Draw the length of an output: the same wherever the request is, for one key and share."""
    i = c.source[slot]
    u = uniform(np.uint64(_mixed(key, i))) + share
    c.output[slot] = draw_output(lengths, s.request[e, i].predicted, c.generated[slot], u % 1.0)


@kernel
def _value(
    p: Params,
    quiet: Params,
    s: State,
    w: Worth,
    lengths: Lengths,
    e: int,
    key: int,
    c: Copied,
    scratch: State,
    out: FloatArray,
) -> None:
    i = s.env[e].deciding
    request = s.request[e, i]
    width = s.observation.shape[2]
    out[:] = 0.0  # a rejection adds nothing and brings nothing
    worst = 0.0
    for r in range(s.env[e].num_replicas):
        if not s.allowed[e, r]:
            continue
        delay_s = step_left_s(p, s, e, r)
        speed = s.replica[e, r].speed if w.sees_speed else s.replica[e, r].base_speed
        count = list_requests(p, s, e, r, i, c)
        own = count - 1
        memory_tokens = s.observation[e, OBSERVED_KV_CAPACITY, r]
        new_tokens = request.prompt - c.computed[count - 1]
        value = 0.0
        for k in range(w.num_samples):
            for slot in range(count):
                _draw(lengths, s, e, key, k / w.num_samples, c, slot)
            before_s = run_dry(p, quiet, s, e, r, speed, c, count - 1, scratch)
            if w.in_time > 0.0:
                value -= w.in_time * _in_time(p, s, e, w, c, count - 1, delay_s, scratch)
            after_s = run_dry(p, quiet, s, e, r, speed, c, count, scratch)
            if w.in_time > 0.0:
                value += w.in_time * _in_time(p, s, e, w, c, count, delay_s, scratch)
            value -= w.second * (delay_s + after_s - before_s)
            if w.memory_price > 0.0:
                held_s = scratch.request[0, own].finish_s - scratch.request[0, own].first_token_s
                share = (request.prompt + c.output[own]) / memory_tokens
                value -= w.second * w.memory_price * share * held_s * own
        value /= w.num_samples
        price = w.prefill_price
        if request.segment_stop > request.segment_first:
            price += w.prefix_price
        if price > 0.0:
            new_s = new_tokens / s.observation[e, OBSERVED_PREFILL_RATE, r]
            value -= w.second * price * s.observation[e, OBSERVED_OUTSTANDING, r] * new_s
        out[r] = value
        worst = min(worst, value)
    out[width] = worst  # nobody knows what a hold is worth: it is not to be learned
    if w.in_time == 0.0:
        out[width + 1] = worst  # who leaves without an answer takes no time, but that is no gain


@kernel
def _value_all(
    p: Params,
    quiet: Params,
    s: State,
    w: Worth,
    lengths: Lengths,
    envs: IntArray,
    first: int,
    stop: int,
    key: int,
    c: Copied,
    scratch: State,
    out: FloatArray,
) -> None:
    for row in range(first, stop):
        own = _mixed(key, envs[row])
        _value(p, quiet, s, w, lengths, envs[row], own, c, scratch, out[row])


class Teacher:
    """Values all choices of the dispatches that are due, in compiled code and in threads.

    Args:
        lengths: What predictions say about lengths.
        worth: How choices are valued.
        num_threads: That work together.
    """

    def __init__(self, lengths: Lengths, worth: Worth, *, num_threads: int = 1) -> None:
        self.lengths, self.worth = lengths, worth
        self._num_threads = num_threads
        self._scratches: list[Scratch] = []
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

    def values(self, simulator: Simulator, envs: IntArray, key: int) -> FloatArray:
        """Value every choice.

        Args:
            simulator: Whose dispatches are due.
            envs: Environments in which one is, `int64[n]`.
            key: Of the futures: other ones for another key.

        Returns:
            Higher is better, `float64[n, R + 2]`: replicas, hold, reject; where one is not allowed,
            anything. A hold is never better than the worst replica.
        """
        if not self._scratches or not self._scratches[0].covers(simulator):
            self._scratches = [Scratch(simulator) for _ in range(self._num_threads)]
        out = np.empty((len(envs), simulator.max_replicas + 2))
        edges = np.linspace(0, len(envs), self._num_threads + 1).astype(int).tolist()

        def part(n: int) -> None:
            scratch = self._scratches[n]
            _value_all(
                simulator.params,
                scratch.quiet,
                simulator.state,
                self.worth,
                self.lengths,
                envs,
                edges[n],
                edges[n + 1],
                key,
                scratch.copied,
                scratch.state,
                out,
            )

        if self._pool is None:
            part(0)
        else:
            for job in [self._pool.submit(part, n) for n in range(self._num_threads)]:
                job.result()
        return out

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pool = None


def due(simulator: Simulator) -> IntArray:
    """Return the environments in which a dispatch is due, `int64[n]`."""
    return np.flatnonzero(simulator.state.env["decision"] == DISPATCH)
