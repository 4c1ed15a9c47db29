"""The live state: the contract's features from what a router does and sees itself.

Every number means what it means in the simulator (`cluster.kernels`, `policy.observe`); a test
feeds simulated runs through this class and compares the observations feature by feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from servegym.cluster.jit import fixed, kernel
from servegym.cluster.spec import SloClass
from servegym.cluster.state import NUM_LENGTH_SUMS
from servegym.policy.contract import (
    ARRIVAL_RATE_RPS,
    DECODES,
    EXPECTED_TOKENS,
    EXPECTED_TOKENS_SPREAD,
    FIRST_NOMINAL,
    GENERATED_TOKENS,
    INFERRED,
    KV_CACHE_USAGE,
    KV_CAPACITY_TOKENS,
    MAX_NUM_SEQS,
    METRICS_AGE_S,
    NO_BOUND,
    NUM_HELD,
    NUM_NOMINAL,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
    NUM_RUNNING,
    NUM_UP,
    NUM_WAITING,
    OUTSTANDING_PREDICTED_TOKENS,
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_REQUESTS,
    PENDING_PREFILL_TOKENS,
    PREDICTED_OUTPUT_TOKENS,
    PREFILL_TOKENS_PER_S,
    PREFILLS,
    PREFIX_HIT_TOKENS,
    PROMPT_TOKENS,
    RECENT_TPOT_S,
    RECENT_TTFT_S,
    RELATIVE_SPEED,
    REPLICA_FEATURES,
    SINCE_DISPATCH_S,
    SLO_WEIGHT,
    TTFT_SLO_S,
    UP,
    WAITED_S,
    Group,
)
from servegym.policy.inferred import count_requests
from servegym.policy.lengths import (
    error_of,
    expected_length,
    learn_length,
    spread_of,
)
from servegym.policy.policy import Observations
from servegym.serve.live_request import LiveRequest
from servegym.serve.streams import Streams
from servegym.typing import BoolArray, FloatArray

#: Weights of the newest value in the moving averages of the contract.
_LATENCY_WEIGHT = 0.1
_ARRIVAL_WEIGHT = 0.02
_FAR_S = 1e6
#: Counters that other routers' requests add to, in the order of `LiveState.own` and `set_others`;
#: the last is the one of `see`'s `generated`.
COUNTED = (
    OUTSTANDING_REQUESTS,
    OUTSTANDING_PROMPT_TOKENS,
    OUTSTANDING_PREDICTED_TOKENS,
    PENDING_PREFILL_TOKENS,
    GENERATED_TOKENS,
)
#: What a state keeps of each replica beside its rows, and what stands there for a free slot.
_OF_NOBODY = {
    "_speed": 0.0,
    "_last_dispatch_s": -math.inf,
    "_last_metrics_s": -math.inf,
    "_generated": 0.0,
    "_engine_counts": False,
}
_INFERRED = INFERRED.value
_ALL = Group.COUNTERS | Group.METRICS | Group.PREFIX


def rehearse_inference() -> None:
    """Compile what a live state calls if somebody needs `Group.LIMITS`: no decision is to wait."""
    count_requests(np.ones((NUM_REPLICA_FEATURES, 1)), 0, np.zeros((0, 4)), 0.0, 0.0, 0.0)


@kernel
def see(
    replicas: FloatArray,
    now_s: float,
    last_metrics_s: FloatArray,
    last_dispatch_s: FloatArray,
    generated: FloatArray,
    engine_counts: BoolArray,
    hits: FloatArray,
    allowed: BoolArray,
    need: float,
    mask: BoolArray,
) -> int:
    """Fill the rows that change by themselves, and say which replicas may be chosen.

    Args:
        replicas: Rows of the fleet, `float64[NUM_REPLICA_FEATURES, R]`.
        now_s: The time.
        last_metrics_s: Of the engines' metrics, `float64[R]`.
        last_dispatch_s: Seconds, `float64[R]`.
        generated: The router's own count of tokens, `float64[R]`.
        engine_counts: Where the engine's count stands instead, `bool[R]`.
        hits: Prompt tokens believed cached, `float64[R]`.
        allowed: Replicas in question, `bool[R]`.
        need: Tokens of KV that the request needs.
        mask: Filled; `bool[R + 2]`, of which the last two are left as they are.

    Returns:
        How many replicas are up.
    """
    num_up, num_chosen, largest = 0, 0, 0.0
    for r in range(replicas.shape[1]):
        replicas[METRICS_AGE_S, r] = min(now_s - last_metrics_s[r], NO_BOUND)
        replicas[SINCE_DISPATCH_S, r] = min(now_s - last_dispatch_s[r], _FAR_S)
        if not engine_counts[r]:
            replicas[GENERATED_TOKENS, r] = generated[r]
        replicas[PREFIX_HIT_TOKENS, r] = hits[r]
        is_up = replicas[UP, r] > 0.0
        num_up += is_up
        capacity = replicas[KV_CAPACITY_TOKENS, r]
        if is_up and allowed[r]:
            largest = max(largest, capacity)
        mask[r] = is_up and allowed[r] and (capacity >= need or capacity == 0.0)
        num_chosen += mask[r]
    if num_up and not num_chosen:
        # too long for all of them: the largest shall say so, in its own words
        for r in range(replicas.shape[1]):
            is_largest = replicas[KV_CAPACITY_TOKENS, r] == largest
            mask[r] = replicas[UP, r] > 0.0 and allowed[r] and is_largest
    return num_up


class EngineMetrics(NamedTuple):
    """What one engine says of itself.

    Attributes:
        num_running: Requests in its running list.
        num_waiting: Requests in its waiting queue.
        kv_cache_usage: Share of KV blocks held, 0 to 1.
        generated_tokens: Output tokens of its requests that have not ended; `None` where the
            engine does not say, then the router's own count stands.
        kv_capacity_tokens: Size of the KV cache; `None` where the engine does not say.
        age_s: How old they were when they were read.
    """

    num_running: float
    num_waiting: float
    kv_cache_usage: float
    generated_tokens: float | None = None
    kv_capacity_tokens: float | None = None
    age_s: float = 0.0


class LiveState:
    """Counters of a fleet, kept event by event.

    Every replica has a slot, which it keeps as long as it is there; whoever comes later takes the
    lowest that is free. Arrays by replica, `[W]`, have a place for every slot, in use or free.

    Args:
        facts: Static rows of every replica, `float64[NUM_NOMINAL, R]`; see `add`.
        slo_classes: Service levels; requests name them by index.
        allow_hold: Whether a request may be held.
        allow_reject: Whether a policy may reject a request.

    Attributes:
        replicas: Replica rows of the observation, `float64[NUM_REPLICA_FEATURES, W]`; of a free
            slot 0. The rows of metrics are as of the last `observe`. Another array once a replica
            has found no free slot.
        in_use: Slots that have a replica, `bool[W]`.
    """

    def __init__(
        self,
        facts: FloatArray,
        slo_classes: Sequence[SloClass] = (SloClass(),),
        *,
        allow_hold: bool = False,
        allow_reject: bool = False,
    ) -> None:
        self.replicas: FloatArray = np.zeros((NUM_REPLICA_FEATURES, 0))
        self.in_use: BoolArray = np.zeros(0, np.bool_)
        self._slo_rows = [
            (min(c.ttft_s, _FAR_S), min(c.tpot_s, _FAR_S), c.weight) for c in slo_classes
        ]
        self._speed = np.zeros(0)  # in the unit of the facts
        self._last_dispatch_s = np.zeros(0)
        self._last_metrics_s = np.zeros(0)
        self._generated = np.zeros(0)  # own count
        self._engine_counts = np.zeros(0, np.bool_)  # the engine says `generated_tokens`
        self._others = np.zeros((len(COUNTED), 0))  # a share of the counters
        self._others_rate_rps, self._others_held = 0.0, 0
        self._arrival_gap_s = math.nan
        self._last_arrival_s = math.nan
        self._num_held = 0
        self._at: list[dict[LiveRequest, None]] = []  # in order of dispatch
        self._streams = Streams(0)
        self._is_watched = False  # since somebody has needed what streams show
        self._length_sums = np.zeros(NUM_LENGTH_SUMS)
        self._request = np.zeros((1, NUM_REQUEST_FEATURES))
        self._mask = np.zeros((1, 2), np.bool_)
        self._allow_hold, self._allow_reject = allow_hold, allow_reject
        self._no_hits = np.zeros(0)
        self._all = np.zeros(0, np.bool_)
        self._grow(facts.shape[1])
        for column in facts.T:
            self.add(column)
        numbers = (self._generated, self._engine_counts, self._no_hits, self._all)
        self._see = fixed(
            see,
            *(self.replicas, 0.0, self._last_metrics_s, self._last_dispatch_s, *numbers, 0.0),
            self._mask[0],
        )

    def add(self, facts: FloatArray) -> int:
        """A replica joins the fleet, up, and with nothing known of it but its facts.

        Args:
            facts: Its static rows, `float64[NUM_NOMINAL]`; see `serve.facts`. The speed may be in
                any unit that all replicas share: shown is its share of the fastest one's. A
                `kv_capacity_tokens` of 0 is filled in from the engine's metrics.

        Returns:
            Its slot.
        """
        if self.in_use.all():
            self._grow(1)
        slot = int(np.argmin(self.in_use))
        self.in_use[slot] = True
        self.replicas[[UP, PREFILLS, DECODES], slot] = 1.0  # nobody moves KV here
        self.set_facts(slot, facts)
        return slot

    def set_facts(self, slot: int, facts: FloatArray) -> None:
        """A replica is known better; see `add`."""
        assert facts.shape == (NUM_NOMINAL,)
        known = self.replicas[KV_CAPACITY_TOKENS, slot]
        self.replicas[FIRST_NOMINAL : FIRST_NOMINAL + NUM_NOMINAL, slot] = facts
        if facts[KV_CAPACITY_TOKENS - FIRST_NOMINAL] == 0.0:
            self.replicas[KV_CAPACITY_TOKENS, slot] = known
        self._speed[slot] = facts[0]
        self._scale_speeds()

    def remove(self, slot: int) -> None:
        """A replica has gone, and all its requests before it; its slot is free."""
        assert self.in_use[slot]
        assert not self._at[slot]
        self.in_use[slot] = False
        self.replicas[:, slot] = 0.0
        self._others[:, slot] = 0.0
        self._streams.clear(slot)
        for name, empty in _OF_NOBODY.items():
            getattr(self, name)[slot] = empty
        self._scale_speeds()

    def _scale_speeds(self) -> None:
        fastest = self._speed.max(initial=0.0)
        self.replicas[RELATIVE_SPEED] = self._speed / fastest if fastest > 0.0 else 0.0

    def _grow(self, more: int) -> None:
        """Make slots for so many more replicas."""
        grown = np.zeros((NUM_REPLICA_FEATURES, self.num_slots + more))
        grown[:, : self.num_slots] = self.replicas
        self.replicas = grown  # in the order that compiled code reads
        self._others = np.append(self._others, np.zeros((len(COUNTED), more)), axis=1)
        for name, empty in _OF_NOBODY.items():
            values = getattr(self, name)
            setattr(self, name, np.append(values, np.full(more, empty, values.dtype)))
        self.in_use = np.append(self.in_use, np.zeros(more, np.bool_))
        self._streams.grow(more)
        self._at += [{} for _ in range(more)]
        self._no_hits = np.zeros(self.num_slots)
        self._all = np.ones(self.num_slots, np.bool_)
        self._mask = np.zeros((1, self.num_slots + 2), np.bool_)
        self._mask[0, -2:] = self._allow_hold, self._allow_reject

    @property
    def num_slots(self) -> int:
        """Places for replicas, free ones included: W."""
        return self.replicas.shape[1]

    @property
    def num_replicas(self) -> int:
        """Size of the fleet, replicas that are down included."""
        return int(self.in_use.sum())

    @property
    def num_held(self) -> int:
        """How many requests are on hold."""
        return self._num_held

    @property
    def arrival_rate_rps(self) -> float:
        """One over the moving average of inter-arrival times; 0 before the second arrival."""
        return 1.0 / self._arrival_gap_s if self._arrival_gap_s > 0.0 else 0.0

    def arrive(
        self,
        now_s: float,
        *,
        key: str,
        prompt_tokens: float,
        predicted_output_tokens: float,
        slo_class: int = 0,
    ) -> LiveRequest:
        """Note an arrival, and begin the books of its request.

        Args:
            now_s: Of one clock that never goes back; all times must be of it.
            key: Names the request.
            prompt_tokens: At least 1.
            predicted_output_tokens: At least 1.
            slo_class: Index of its service level.
        """
        gap_s = now_s - self._last_arrival_s
        if math.isnan(self._arrival_gap_s):
            self._arrival_gap_s = gap_s  # still NaN at the very first
        else:
            self._arrival_gap_s += _ARRIVAL_WEIGHT * (gap_s - self._arrival_gap_s)
        self._last_arrival_s = now_s
        return LiveRequest(key, now_s, prompt_tokens, predicted_output_tokens, slo_class)

    def observe(
        self,
        request: LiveRequest,
        now_s: float,
        *,
        hit_tokens: FloatArray | None = None,
        allowed: BoolArray | None = None,
        may_hold: bool = True,
        needs: Group = _ALL,
    ) -> Observations:
        """Describe the decision that is due for a request.

        Args:
            request: The one to decide about; a held one is no longer counted as held.
            now_s: The time.
            hit_tokens: Leading prompt tokens believed cached, `float64[W]`; `None`: unknown, 0.
            allowed: Replicas that are in question, `bool[W]`; `None`: all that are up.
            may_hold: Whether it may be held (again).
            needs: Groups of features; of those in `INFERRED`, what is not needed is old or 0.

        Returns:
            A batch of one, in arrays that the next call overwrites, with a column for every slot,
            in use or free. Metrics that were never seen have the contract's largest age,
            `NO_BOUND`.
        """
        replicas, mask, row = self.replicas, self._mask[0], self._request[0]
        hits = self._no_hits if hit_tokens is None else np.ascontiguousarray(hit_tokens, np.float64)
        asked = self._all if allowed is None else np.ascontiguousarray(allowed, np.bool_)
        assert len(hits) == len(asked) == replicas.shape[1]
        num_up = self._see(
            replicas,
            now_s,
            self._last_metrics_s,
            self._last_dispatch_s,
            self._generated,
            self._engine_counts,
            hits,
            asked,
            request.prompt_tokens + request.predicted_output_tokens - 1.0,
            mask,
        )
        mask[-2] = self._allow_hold and may_hold
        row[PROMPT_TOKENS] = request.prompt_tokens
        row[PREDICTED_OUTPUT_TOKENS] = request.predicted_output_tokens
        row[TTFT_SLO_S : SLO_WEIGHT + 1] = self._slo_rows[request.slo_class]
        row[WAITED_S] = now_s - request.arrival_s
        row[ARRIVAL_RATE_RPS] = self.arrival_rate_rps + self._others_rate_rps
        row[NUM_UP] = num_up
        row[NUM_HELD] = self._num_held - request.held + self._others_held
        if needs._value_ & _INFERRED:  # the flags' own operator takes 2 µs
            self._infer(request, now_s, needs)
        return Observations(replicas[None], self._request, self._mask)

    def dispatch(self, request: LiveRequest, replica: int, now_s: float) -> None:
        """A request goes to a replica; `observe` has just described the choice."""
        self._resume(request)
        request.replica = replica
        request.dispatch_s = now_s
        request.believed_cached = float(self.replicas[PREFIX_HIT_TOKENS, replica])
        self._last_dispatch_s[replica] = now_s
        self.replicas[OUTSTANDING_REQUESTS, replica] += 1.0
        self.replicas[OUTSTANDING_PROMPT_TOKENS, replica] += request.prompt_tokens
        self.replicas[OUTSTANDING_PREDICTED_TOKENS, replica] += request.predicted_output_tokens
        self._generated[replica] += request.generated_tokens
        self._at[replica][request] = None
        if math.isnan(request.first_token_s):
            request.prefill_is_pending = True
            self.replicas[PENDING_PREFILL_TOKENS, replica] += (
                request.prompt_tokens - request.believed_cached
            )

    def hold(self, request: LiveRequest) -> None:
        """A request stays at the router for a while."""
        if not request.held:
            request.held = True
            self._num_held += 1

    def end_prefill(self, request: LiveRequest) -> None:
        """The prompt is computed, as far as the router knows or assumes."""
        if request.prefill_is_pending:
            request.prefill_is_pending = False
            r = request.replica
            self.replicas[PENDING_PREFILL_TOKENS, r] -= (
                request.prompt_tokens - request.believed_cached
            )

    def first_token(self, request: LiveRequest, now_s: float) -> None:
        """The first token has come; later calls for the same request change nothing."""
        if not math.isnan(request.first_token_s):
            return
        self.end_prefill(request)
        request.first_token_s = now_s
        self._begin_decoding(request, now_s)
        self._average(RECENT_TTFT_S, request.replica, now_s - request.arrival_s)

    def tokens(self, request: LiveRequest, count: int, now_s: float) -> None:
        """So many more output tokens have come."""
        if not request.is_decoding:
            if not math.isnan(request.first_token_s):  # taken up by another replica
                self._begin_decoding(request, now_s)
        elif request.generated_tokens > 0:  # else the first one, which ends a prefill, not a step
            r = request.replica
            if self._is_watched:
                unseen = float(self._others[0, r])
                there = len(self._at[r]) + int(unseen)
                self._streams.step(r, count, unseen, there, self.replicas[:, r], now_s)
            else:
                self._streams.skip(r, now_s)
        request.generated_tokens += count
        self._generated[request.replica] += count

    def finish(self, request: LiveRequest, now_s: float, output_tokens: int) -> None:
        """A request has all its tokens.

        Args:
            request: Which has ended.
            now_s: The time.
            output_tokens: How many there are.
        """
        r = request.replica
        first_s = request.first_token_s
        self._forget(request)
        if output_tokens > 0:
            learn_length(self._length_sums, request.predicted_output_tokens, output_tokens)
        if output_tokens > 1 and now_s > first_s:
            self._average(RECENT_TPOT_S, r, (now_s - first_s) / (output_tokens - 1))

    @contextmanager
    def without(self, request: LiveRequest) -> Iterator[None]:
        """See the fleet as if a request were not at its replica, of which no token has come."""
        assert not request.is_decoding
        r = request.replica
        counted = [
            OUTSTANDING_REQUESTS,
            OUTSTANDING_PROMPT_TOKENS,
            OUTSTANDING_PREDICTED_TOKENS,
            PENDING_PREFILL_TOKENS,
        ]
        saved, there = self.replicas[counted, r], self._at[r]
        prefill = request.prefill_is_pending * (request.prompt_tokens - request.believed_cached)
        parts = (1.0, request.prompt_tokens, request.predicted_output_tokens, prefill)
        self.replicas[counted, r] -= parts
        self._at[r] = {other: None for other in there if other is not request}
        try:
            yield
        finally:
            self.replicas[counted, r] = saved
            self._at[r] = there

    def leave(self, request: LiveRequest) -> None:
        """A request is gone before its end: cancelled, failed, rejected, or decided again."""
        self._resume(request)
        if request.replica >= 0:
            self._forget(request)

    def set_up(self, replica: int, up: bool) -> None:
        """A replica takes requests from now on, or does not."""
        self.replicas[UP, replica] = float(up)

    @property
    def up(self) -> BoolArray:
        """Replicas that take requests, `bool[W]`."""
        return self.replicas[UP] > 0.0

    def is_up(self, replica: int) -> bool:
        """Whether a replica takes requests."""
        return bool(self.replicas[UP, replica] > 0.0)

    def has_room(self, max_load: float) -> BoolArray:
        """Replicas with fewer requests than so many times their `max_num_seqs`, `bool[W]`."""
        outstanding, seqs = self.replicas[OUTSTANDING_REQUESTS], self.replicas[MAX_NUM_SEQS]
        return np.asarray(outstanding < max_load * seqs)

    def update_metrics(self, replica: int, metrics: EngineMetrics, now_s: float) -> None:
        """Note what an engine says of itself.

        Args:
            replica: Whose.
            metrics: What it says.
            now_s: When they were asked for.
        """
        self.replicas[NUM_RUNNING, replica] = metrics.num_running
        self.replicas[NUM_WAITING, replica] = metrics.num_waiting
        self.replicas[KV_CACHE_USAGE, replica] = metrics.kv_cache_usage
        self._engine_counts[replica] = metrics.generated_tokens is not None
        if metrics.generated_tokens is not None:
            self.replicas[GENERATED_TOKENS, replica] = metrics.generated_tokens
        if (
            metrics.kv_capacity_tokens is not None
            and self.replicas[KV_CAPACITY_TOKENS, replica] == 0.0
        ):
            self.replicas[KV_CAPACITY_TOKENS, replica] = metrics.kv_capacity_tokens
        self._last_metrics_s[replica] = now_s - metrics.age_s

    def outstanding(self, replica: int) -> int:
        """Requests dispatched to a replica and not ended; others' are not among them."""
        return len(self._at[replica])

    def own(self) -> FloatArray:
        """Return the counters (`COUNTED`) of the requests dispatched here, `float64[5, W]`."""
        held = np.vstack((self.replicas[list(COUNTED[:-1])], self._generated))
        return np.asarray(held - self._others)

    def set_others(self, counters: FloatArray, arrival_rate_rps: float, num_held: int) -> None:
        """Note what other routers have at the same replicas: decisions see it added to one's own.

        Args:
            counters: Of all of them together (`COUNTED`), `float64[5, W]`; each call replaces what
                the one before has said. Free slots have none.
            arrival_rate_rps: What comes to them.
            num_held: Requests that they hold.
        """
        assert counters.shape == self._others.shape
        counters = np.where(self.in_use, counters, 0.0)
        more = counters - self._others
        self.replicas[list(COUNTED[:-1])] += more[:-1]
        self._generated += more[-1]
        self._others = counters
        self._others_rate_rps, self._others_held = arrival_rate_rps, num_held

    def kv_capacity_tokens(self, replica: int) -> float:
        """Size of a replica's KV cache; 0 while it is unknown."""
        return float(self.replicas[KV_CAPACITY_TOKENS, replica])

    def metrics_age_s(self, replica: int, now_s: float) -> float:
        """Age of a replica's metrics; `NO_BOUND` before the first."""
        return min(now_s - float(self._last_metrics_s[replica]), NO_BOUND)

    def prefill_left_s(self, replica: int) -> float:
        """Seconds that the prompts on a replica still take at its known rate."""
        rate = self.replicas[PREFILL_TOKENS_PER_S, replica]
        return float(self.replicas[PENDING_PREFILL_TOKENS, replica] / rate) if rate > 0 else 0.0

    def describe(self, replica: int) -> dict[str, float]:
        """Return a replica's row as of the last `observe`, by feature name."""
        return {f.name: float(self.replicas[i, replica]) for i, f in enumerate(REPLICA_FEATURES)}

    def _average(self, row: int, replica: int, value_s: float) -> None:
        old = self.replicas[row, replica]
        self.replicas[row, replica] = (
            value_s if old == 0.0 else old + _LATENCY_WEIGHT * (value_s - old)
        )

    def _resume(self, request: LiveRequest) -> None:
        if request.held:
            request.held = False
            self._num_held -= 1

    def _begin_decoding(self, request: LiveRequest, now_s: float) -> None:
        request.is_decoding = True
        r = request.replica
        self._streams.begin(r, len(self._at[r]) + int(self._others[0, r]), now_s)

    def _infer(self, request: LiveRequest, now_s: float, needs: Group) -> None:
        """Fill the inferred rows; `policy.inferred.infer` in plain Python."""
        self._is_watched = True
        replicas, row = self.replicas, self._request[0]
        error = error_of(self._length_sums)
        variance = error[3]
        request.expected_tokens = expected_length(request.predicted_output_tokens, error)
        row[EXPECTED_TOKENS] = request.expected_tokens
        row[EXPECTED_TOKENS_SPREAD] = spread_of(variance)
        self._streams.look(replicas, now_s)
        if not needs & Group.LIMITS:
            return
        limit_s = self._slo_rows[request.slo_class][1]
        for r, there in enumerate(self._at):
            if not self.in_use[r]:
                continue
            known = [
                (
                    self._expected(q, error),
                    q.generated_tokens,
                    0.0 if math.isnan(q.first_token_s) else now_s - q.first_token_s,
                    self._slo_rows[q.slo_class][1],
                )
                for q in there
            ]
            requests = np.array(known, np.float64).reshape(-1, 4)
            new = max(0.0, request.prompt_tokens - float(replicas[PREFIX_HIT_TOKENS, r]))
            count_requests(replicas, r, requests, variance, limit_s, new)

    @staticmethod
    def _expected(request: LiveRequest, error: tuple[float, float, float, float]) -> float:
        if request.expected_tokens == 0.0:
            request.expected_tokens = expected_length(request.predicted_output_tokens, error)
        return request.expected_tokens

    def _forget(self, request: LiveRequest) -> None:
        """Take a request out of the counters of its replica."""
        r = request.replica
        self.end_prefill(request)
        del self._at[r][request]
        if request.is_decoding:
            request.is_decoding = False
            self._streams.end(r)
        self.replicas[OUTSTANDING_REQUESTS, r] -= 1.0
        self.replicas[OUTSTANDING_PROMPT_TOKENS, r] -= request.prompt_tokens
        self.replicas[OUTSTANDING_PREDICTED_TOKENS, r] -= request.predicted_output_tokens
        self._generated[r] -= request.generated_tokens
        if not self._at[r]:  # no rounding left behind
            self.replicas[list(COUNTED[:-1]), r] = self._others[:-1, r]
            self._generated[r] = self._others[-1, r]
        request.replica = -1
