"""The live replica does what the simulator does, and what it adds to it is right."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from servegym.cluster import state as st
from servegym.cluster.reference import ReferenceSimulator
from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, Faults, ReplicaType
from servegym.engines import ENGINES
from servegym.errors import ConfigError
from servegym.serve.engine.core import Noise
from servegym.serve.engine.replica import Replica
from servegym.serve.engine.request import EngineRequest, Status
from servegym.workloads.table import RequestTable

from ...cluster.strategies import (  # noqa: TID252
    choose,
    long_answers,
    random_case,
    random_grid,
)
from ...random_blocks import blocks  # noqa: TID252 - tests are no package
from .naive import NaiveReplica, NaiveRequest

COMPARED = (st.EV_ADMIT, st.EV_FIRST_TOKEN, st.EV_PREEMPT, st.EV_FINISH)


class Log:
    """Events of live replicas in the simulator's form, and what the steps gave out."""

    def __init__(self) -> None:
        self.events: list[tuple[float, int, int, int, float]] = []
        self.replica = 0

    def _note(self, request: EngineRequest, now_s: float, kind: int, value: float = 0.0) -> None:
        self.events.append((now_s, kind, int(request.request_id.split()[-1]), self.replica, value))

    def admitted(self, request, now_s):
        self._note(request, now_s, st.EV_ADMIT, request.cached_tokens)

    def preempted(self, request, now_s):
        self._note(request, now_s, st.EV_PREEMPT)

    def emitted(self, request, now_s):
        if math.isnan(request.first_token_s):
            self._note(request, now_s, st.EV_FIRST_TOKEN)

    def finished(self, request, now_s):
        self._note(request, now_s, st.EV_FINISH)

    def decoded(self, gap_s, count):
        pass


def block_names(table: RequestTable, i: int, size: int):
    """What the KV blocks of a request of a table contain."""
    rows = range(table.prefix_offsets[i], table.prefix_offsets[i + 1])
    segments = [(int(table.prefix_keys[k]), int(table.prefix_ends[k])) for k in rows]

    def name(j: int) -> int:
        last = (j + 1) * size - 1
        text = next(((0, key) for key, end in segments if end > last), (1, i))
        return hash((*text, j))

    return name


class LiveCluster:
    """Live replicas that are given what the simulator's router and fault list gave its own."""

    def __init__(self, spec, episode) -> None:
        self.table, self.size, self.log = episode.table, spec.block_size, Log()
        self.requests: dict[int, EngineRequest] = {}
        self.replicas = [
            Replica(
                spec.types[t],
                self.log,
                block_size=spec.block_size,
                prefix_caching=spec.prefix_caching,
                chunked_prefill=spec.chunked_prefill,
                speed=float(episode.speed[r]),
                noise=Noise(spec.noise_sigma, spec.noise_period_steps, episode.noise_seed, r),
            )
            for r, t in enumerate(episode.type_idx)
        ]

    def run_until(self, r: int, time_s: float, inclusive: bool) -> None:
        replica = self.replicas[r]
        self.log.replica = r
        while replica.due_s < time_s or (inclusive and replica.due_s == time_s < math.inf):
            replica.step()

    def dispatch(self, time_s: float, i: int, r: int) -> None:
        self.run_until(r, time_s, True)
        prompt, output = int(self.table.prompt_tokens[i]), int(self.table.output_tokens[i])
        live = EngineRequest(str(i), prompt, output, block_names(self.table, i, self.size))
        before = self.requests.get(i)
        if before is not None:  # came back from a failed replica
            live._generated = before._generated
            live.cached_tokens = before.cached_tokens
            live.first_token_s = before.first_token_s
        self.requests[i] = live
        self.replicas[r].submit(live, time_s)

    def fault(self, time_s: float, r: int, kind: int, value: float) -> None:
        self.run_until(r, time_s, False)
        replica = self.replicas[r]
        if kind == st.FAULT_SLOW:
            replica.speed_up(value, time_s)
        elif kind == st.FAULT_DOWN:
            for request in replica._inside.values():
                request._generated = replica.generated(request)
                request._joined = -1
            replica.fail(time_s)


def play_live(spec, episode, events) -> Log:
    cluster = LiveCluster(spec, episode)
    faults = episode.faults
    actions = [
        (float(faults.time_s[k]), 0, k, int(faults.replica[k]), int(faults.kind[k]))
        for k in range(len(faults))
    ]
    for k, event in enumerate(events[events["kind"] == st.EV_DISPATCH]):
        actions.append((float(event["time_s"]), 1, k, int(event["replica"]), int(event["request"])))
    for time_s, is_dispatch, k, r, what in sorted(actions):
        if is_dispatch:
            cluster.dispatch(time_s, what, r)
        else:
            cluster.fault(time_s, r, what, float(faults.value[k]))
    for r in range(len(cluster.replicas)):
        cluster.run_until(r, math.inf, False)
    return cluster.log


def assert_plays_as_the_simulator(spec: ClusterSpec, episode: Episode, seed: int) -> int:
    """Compare all times, bit by bit; return how many requests ended."""
    sim = Simulator(spec, [episode], record=True)
    visits: dict[int, int] = {}
    while sim.advance()[0] == st.DECISION:
        request = int(sim.state.env[0]["deciding"])
        visits[request] = visits.get(request, -1) + 1
        allowed = sim.state.allowed[0].tolist()
        sim.apply(np.array([choose(request, visits[request], allowed)]))
    events = sim.events()
    want = sorted(
        tuple(e[name].item() for name in ("time_s", "kind", "request", "replica", "value"))
        for e in events[np.isin(events["kind"], COMPARED)]
    )
    assert sorted(play_live(spec, episode, events).events) == want, f"seed {seed}"
    return int((events["kind"] == st.EV_FINISH).sum())


@pytest.mark.parametrize("block", blocks(4))
def test_replica_agrees_with_the_simulator_to_the_bit_on_random_workloads(block):
    for seed in range(50 * block, 50 * block + 50):
        assert assert_plays_as_the_simulator(*random_case(seed), seed) > 0


def in_order_of_arrival(spec: ClusterSpec, episode: Episode) -> tuple[ClusterSpec, Episode]:
    """Let nobody be held, or come back from a failed replica: all arrive once."""
    return replace(spec, allow_hold=False), replace(episode, faults=Faults())


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "vllm"])
def test_replica_of_another_engine_agrees_with_the_simulator_to_the_bit(engine):
    for seed in range(50):
        cases = [random_case(seed, [engine])]
        if engine == "sglang":
            cases.append(long_answers(seed, engine))
        for case in cases:
            if engine == "vllm-priority":  # it goes by the times of arrival at the replica
                case = in_order_of_arrival(*case)
            assert assert_plays_as_the_simulator(*case, seed) > 0


class GapLog(Log):
    """Adds up times between tokens, and the times from first to last token."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps_s = self.decode_s = 0.0
        self.num_gaps = 0

    def decoded(self, gap_s, count):
        assert gap_s > 0
        self.gaps_s += gap_s * count
        self.num_gaps += count

    def emitted(self, request, now_s):
        if not math.isnan(request.first_token_s):  # after a preemption
            self.decoded(now_s - request.last_token_s, 1)

    def finished(self, request, now_s):
        self.decode_s += now_s - request.first_token_s


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "vllm-priority"])
def test_times_between_tokens_add_up_to_the_time_of_decoding(engine):
    # of vLLM by priorities a step may leave a request out, which is not counted as its gap
    preemptions = 0
    for seed in range(30):
        spec, episode = random_case(seed, [engine])
        if engine == "sglang":
            spec, episode = long_answers(seed, engine)
        kind, table, log = spec.types[int(episode.type_idx[0])], episode.table, GapLog()
        live = Replica(
            kind,
            log,
            block_size=spec.block_size,
            prefix_caching=spec.prefix_caching,
            chunked_prefill=spec.chunked_prefill,
        )
        for i, time_s in enumerate(table.arrival_s.tolist()):
            while live.due_s <= time_s:
                live.step()
            prompt, output = int(table.prompt_tokens[i]), int(table.output_tokens[i])
            names = block_names(table, i, spec.block_size)
            live.submit(EngineRequest(str(i), prompt, output, names), time_s)
        while live.due_s < math.inf:
            live.step()
        assert log.num_gaps == table.output_tokens.sum() - len(table)
        assert log.gaps_s == pytest.approx(log.decode_s, rel=1e-9)
        preemptions += sum(kind == st.EV_PREEMPT for _, kind, *_ in log.events)
    assert preemptions > 20 or engine == "trtllm"


def random_stream(seed: int):
    """A small replica, and requests with priorities, shared prefixes and aborts."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([1, 2, 4, 16]))
    seqs = int(rng.choice([2, 4, 12]))
    kind = ReplicaType(
        name="small",
        grid=random_grid(rng),
        num_blocks=-(-120 // size) + int(rng.integers(0, 1 + 120 // size)),
        max_num_batched_tokens=int(max(seqs, rng.choice([4, 16, 64]))),
        max_num_seqs=seqs,
    )
    n = int(rng.integers(2, 50))
    arrival_s = np.cumsum(rng.exponential(rng.choice([0.001, 0.02]), n)).tolist()
    requests = []
    for i in range(n):
        prompt, output = int(rng.integers(1, 70)), int(rng.integers(1, 50))
        shared = int(rng.integers(0, 60))
        group = int(rng.integers(0, 3))
        identities = [
            hash((group, j)) if (j + 1) * size <= shared else hash((i, j, "own"))
            for j in range(prompt + output)
        ]
        requests.append((arrival_s[i], i, prompt, output, int(rng.integers(-2, 3)), identities))
    aborts = [
        (arrival_s[i] + float(rng.exponential(0.3)), i) for i in range(n) if rng.random() < 0.25
    ]
    return kind, size, bool(rng.random() < 0.7), requests, aborts


class TokenLog(Log):
    def __init__(self) -> None:
        super().__init__()
        self.plain: list[tuple[float, str, int]] = []

    def preempted(self, request, now_s):
        self.plain.append((now_s, "preempt", int(request.request_id)))

    def finished(self, request, now_s):
        self.plain.append((now_s, "finish", int(request.request_id)))


def assert_same_times(got, want, seed: int) -> None:
    """Compare events as (time, what, request); times but for rounding: stretches are sums."""
    got, want = (sorted(events, key=lambda e: (*e[1:], e[0])) for events in (got, want))
    assert [e[1:] for e in got] == [e[1:] for e in want], f"seed {seed}"
    np.testing.assert_allclose([e[0] for e in got], [e[0] for e in want], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("block", blocks(4))
def test_priorities_preemption_and_aborts_agree_with_a_plain_scheduler(block):
    preemptions = left_out = 0
    for seed in range(50 * block, 50 * block + 50):
        kind, size, caching, stream, aborts = random_stream(seed)
        log = TokenLog()
        live = Replica(kind, log, block_size=size, prefix_caching=caching)
        naive = NaiveReplica(kind, size, caching)
        mine, plain, tokens = {}, {}, []
        actions = sorted(
            [(row[0], 0, row[1], row) for row in stream]
            + [(time_s, 1, i, ()) for time_s, i in aborts]
        )
        for time_s, is_abort, i, row in [*actions, (math.inf, 2, 0, ())]:
            for engine in (live, naive):
                while engine.due_s <= time_s and engine.due_s < math.inf:
                    now_s = engine.due_s
                    engine.step()
                    if engine is live:
                        tokens += [(now_s, "token", int(q.request_id)) for q in live.outbox]
                        live.outbox.clear()
                        left_out += len(live._skipped)
            assert live.due_s == pytest.approx(naive.due_s, rel=1e-9), f"seed {seed}"
            assert live.num_free_blocks == len(naive.pool.free), f"seed {seed}"
            assert live.num_running == len(naive.running)
            assert live.num_waiting == len(naive.waiting)
            if is_abort == 0:
                _, _, prompt, output, priority, identities = row
                mine[i] = EngineRequest(str(i), prompt, output, identities.__getitem__, priority)
                plain[i] = NaiveRequest(i, prompt, output, priority, time_s, identities)
                live.submit(mine[i], time_s)
                naive.submit(plain[i])
            elif is_abort == 1:
                live.abort(mine[i], time_s)
                naive.abort(plain[i])
        want = [e for e in naive.events if e[1] != "admit"]
        assert_same_times(tokens + log.plain, want, seed)
        preemptions += sum(e[1] == "preempt" for e in want)
        assert live.num_running == live.num_waiting == 0
        assert live.num_free_blocks == kind.num_blocks
        assert {q.status for q in mine.values()} <= {Status.FINISHED, Status.ABORTED}
    assert preemptions > 100
    assert left_out > 0


class PlainEngine:
    """An engine of the plain simulator alone, with the calls of a live replica."""

    def __init__(self, spec: ClusterSpec, episode: Episode) -> None:
        self.sim = ReferenceSimulator(spec, episode)
        self.engine = self.sim.replicas[0]

    @property
    def due_s(self) -> float:
        return self.engine.due_s

    def step(self) -> None:
        self.sim.now_s = self.due_s
        if self.engine.stepping:
            self.engine.end_step()
        self.engine.begin_step()

    def submit(self, i: int, now_s: float) -> None:
        self.sim.now_s = now_s
        self.engine.waiting.append(self.sim.requests[i])
        self.engine.wake()

    def abort(self, i: int) -> None:
        self.engine.abort(self.sim.requests[i])


@pytest.mark.parametrize("engine", ENGINES)
def test_aborts_agree_with_the_plain_engines(engine):
    aborted = preemptions = 0
    for seed in range(60):
        spec, episode = random_case(seed, [engine])
        if engine == "sglang" and seed % 3 == 0:
            spec, episode = long_answers(seed, engine)
        kind, table = spec.types[int(episode.type_idx[0])], episode.table
        spec = replace(spec, types=(kind,), noise_sigma=0.0)
        episode = replace(
            episode, type_idx=np.zeros(1, np.int16), speed=np.ones(1), faults=Faults()
        )
        plain, log = PlainEngine(spec, episode), Log()
        live = Replica(
            kind,
            log,
            block_size=spec.block_size,
            prefix_caching=spec.prefix_caching,
            chunked_prefill=spec.chunked_prefill,
        )
        rng = np.random.default_rng((seed, 5))
        actions = [(float(t), 0, i) for i, t in enumerate(table.arrival_s)]
        actions += [(t + rng.exponential(0.2), 1, i) for t, _, i in actions if rng.random() < 0.4]
        mine: dict[int, EngineRequest] = {}
        for time_s, is_abort, i in [*sorted(actions), (math.inf, 2, 0)]:
            for each in (live, plain):
                while each.due_s <= time_s and each.due_s < math.inf:
                    each.step()
            assert live.due_s == pytest.approx(plain.due_s, rel=1e-9), f"seed {seed}"
            assert live.num_free_blocks == len(plain.engine.pool.free), f"seed {seed}"
            assert live.num_running == len(plain.engine.running), f"seed {seed}"
            assert live.num_waiting == len(plain.engine.waiting), f"seed {seed}"
            if is_abort == 0:
                prompt, output = int(table.prompt_tokens[i]), int(table.output_tokens[i])
                names = block_names(table, i, spec.block_size)
                mine[i] = EngineRequest(str(i), prompt, output, names)
                live.submit(mine[i], time_s)
                plain.submit(i, time_s)
            elif is_abort == 1:
                live.abort(mine[i], time_s)
                plain.abort(i)
        events = plain.sim.events()
        want = [(e["time_s"], e["kind"], e["request"]) for e in events]
        assert_same_times([(e[0], e[1], e[2]) for e in log.events], want, seed)
        aborted += sum(q.status == Status.ABORTED for q in mine.values())
        preemptions += int((events["kind"] == st.EV_PREEMPT).sum())
        assert live.num_free_blocks == kind.num_blocks
    assert aborted > 200
    assert preemptions > 20 or engine == "trtllm"


def small_replica(**settings) -> Replica:
    kind = ReplicaType("small", random_grid(np.random.default_rng(0)), 32, 64, 8)
    return Replica(kind, Log(), **settings)


def test_outbox_has_first_and_last_token_and_every_third_between_when_interval_is_three():
    replica = small_replica(stream_interval=3)
    request = EngineRequest("0", 10, 12, lambda j: j)
    replica.submit(request, 0.0)
    sent = []
    while not math.isinf(replica.due_s):
        replica.step()
        if request in replica.outbox:
            sent.append(replica.generated(request))
        replica.outbox.clear()
    assert sent == [1, 4, 7, 10, 12]


def test_request_that_can_never_fit_is_refused_with_the_room_there_is():
    replica = small_replica()
    with pytest.raises(ConfigError, match="holds 512 tokens, but prompt and output make 513"):
        replica.submit(EngineRequest("0", 500, 14, lambda j: j), 0.0)
    assert math.isinf(replica.due_s)
    replica.submit(EngineRequest("0", 500, 13, lambda j: j), 0.0)


def test_failed_replica_is_empty_and_gives_its_requests_back():
    replica = small_replica()
    requests = [EngineRequest(str(i), 30, 9, lambda j, i=i: 100 * i + j) for i in range(12)]
    for request in requests:
        replica.submit(request, 0.0)
    for _ in range(4):
        replica.step()
    assert replica.num_running == 8
    assert replica.kv_usage > 0
    assert set(replica.fail(replica.due_s)) == set(requests)
    assert (replica.num_running, replica.num_waiting, replica.kv_usage) == (0, 0, 0.0)
    assert math.isinf(replica.due_s)
    again = EngineRequest("99", 30, 2, lambda j: j)
    replica.submit(again, 1.0)
    for _ in range(3):
        replica.step()
    assert again.status == Status.FINISHED
    assert again.cached_tokens == 0


def test_queue_forgets_aborted_requests_though_its_head_is_stuck():
    replica = small_replica()
    for i in range(8):
        replica.submit(EngineRequest(str(i), 60, 40, lambda j, i=i: 100 * i + j), 0.0)
    replica.step()
    for i in range(5000):
        request = EngineRequest(f"storm {i}", 60, 40, lambda j: j)
        replica.submit(request, 0.0)
        replica.abort(request, 0.0)
    assert replica.num_running + replica.num_waiting == 8
    assert len(replica._core._places) == 64 - 8
    while not math.isinf(replica.due_s):
        replica.step()
    assert sum(kind == st.EV_FINISH for _, kind, *_ in replica._observer.events) == 8
