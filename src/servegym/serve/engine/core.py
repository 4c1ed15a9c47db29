"""The compiled simulator as one engine whose requests come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numba import typeof

from servegym.cluster.aborts import abort
from servegym.cluster.allocate import (
    PER_REQUEST,
    Capacity,
    load_episode,
    make_params,
    make_state,
    wanted_entries,
)
from servegym.cluster.entry import addresses
from servegym.cluster.live import (
    FORMED,
    NUM_COMPUTED,
    NUM_LOGGED,
    NUM_SKIPPED,
    REPORT_HEAD,
    come,
    fail,
    foresee,
    held_blocks,
    postpone,
    speed_up,
    turn,
)
from servegym.cluster.live_transfers import (
    OTHER_END,
    fetch,
    land_due,
    next_landing_s,
    release_kept,
    withdraw,
)
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType, TransferRules
from servegym.cluster.state import DOWN, NEVER, OBSERVED_UP, Asks
from servegym.engines import ENGINES, EngineName
from servegym.serve.engine.segments import Segments
from servegym.workloads.table import RequestTable

#: Places for requests at first; there are twice as many whenever they do not suffice.
_FIRST_PLACES = 64
#: Ends of steps that are foreseen at once.
_FORESEEN = 64


class Noise(NamedTuple):
    """How the step times of a replica scatter.

    Attributes:
        sigma: Standard deviation of their logarithm; 0 is none.
        period_steps: Steps that share a draw.
        seed: Of the draws.
        stream: The replica's place in its scenario.
    """

    sigma: float = 0.0
    period_steps: int = 1
    seed: int = 0
    stream: int = 0


NO_NOISE = Noise()


class Event(NamedTuple):
    """A line of the event log, see `cluster.outcome.EVENT_DTYPE`; requests are places here."""

    time_s: float
    value: float
    request: int
    replica: int
    kind: int


class Turn(NamedTuple):
    """What happened when a step ended and the next began.

    Attributes:
        events: Admissions, preemptions, ends and first tokens, in order.
        computed: Requests whose prompts were computed in the step that ended.
        skipped: Running requests that the step that begins leaves out.
        mode: What the engine does now, see `cluster.state`.
    """

    events: list[Event]
    computed: list[int]
    skipped: list[int]
    mode: int


class EngineCore:
    """One replica in arrays, played by the simulator's kernels.

    Requests are known by their places, which are used again when they have left.

    Args:
        kind: Replica type.
        block_size: Tokens in a KV block.
        prefix_caching: Whether KV blocks of equal prefixes are used again.
        chunked_prefill: Whether a prompt may be split over steps.
        speed: Speed factor, 1 is nominal.
        noise: Of step times.
        transfers: How KV comes and goes where replicas have roles; `None`: it stays.
        other_ends: Types of the replicas that KV comes from, at least one if any does.

    Attributes:
        longest_tokens: KV tokens that one request can come to have.
    """

    def __init__(
        self,
        kind: ReplicaType,
        *,
        block_size: int,
        prefix_caching: bool,
        chunked_prefill: bool,
        speed: float,
        noise: Noise,
        transfers: TransferRules | None = None,
        other_ends: tuple[ReplicaType, ...] = (),
    ) -> None:
        spec = ClusterSpec(
            types=(kind, *other_ends),
            transfers=transfers or TransferRules(),
            block_size=block_size,
            prefix_caching=prefix_caching,
            chunked_prefill=chunked_prefill,
            noise_sigma=noise.sigma,
            noise_period_steps=noise.period_steps,
        )
        self._caching = prefix_caching
        asks = Asks(dispatch=NEVER)
        self._params = make_params(spec, record=True, asks=asks)
        self.longest_tokens = int(self._params.longest_tokens[0])
        sizes = Capacity(
            num_envs=1,
            requests=_FIRST_PLACES,
            segments=1,
            names=1,
            replicas=1 + bool(other_ends),
            faults=1,
            longest_tokens=self.longest_tokens,
            # in one step each request may be admitted, preempted and ended a few times over
            log=12 * (_FIRST_PLACES + kind.max_num_seqs) + 64,
        )
        self._state = make_state(spec, sizes)
        kinds = typeof(self._params), typeof(self._state)
        self._params.entries[:] = addresses(*kinds, wanted_entries(spec, asks))
        nobody = RequestTable.build(np.zeros(1), np.ones(1, np.int32), np.ones(1, np.int32))
        there = np.arange(1 + bool(other_ends), dtype=np.int16)
        episode = Episode(nobody, there, np.full(len(there), speed), noise_seed=noise.seed)
        load_episode(self._params, self._state, 0, episode)
        self._state.env["num_requests"] = self._state.env["next_sent"] = 0
        self._state.replica["noise_stream"] = noise.stream
        self._state.observation[0, OBSERVED_UP, 1:] = 0.0  # what stands for other ends
        self._state.replica["mode"][0, 1:] = DOWN
        self._per_request = PER_REQUEST + (("transfer",) if spec.moves_kv else ())
        if spec.moves_kv:
            self._stay(0)
        self._places = list(range(_FIRST_PLACES))[::-1]
        self._segments = Segments(block_size)
        self._report = np.zeros(REPORT_HEAD + kind.max_num_seqs, np.int64)
        self._times_s = np.zeros(_FORESEEN)

    @property
    def num_running(self) -> int:
        """Requests in the running list."""
        return int(self._state.replica[0, 0]["num_running"])

    @property
    def num_waiting(self) -> int:
        """Requests in the waiting queue."""
        return int(self._state.replica[0, 0]["num_waiting"])

    @property
    def iteration(self) -> int:
        """Steps ended in which decoding requests took part, as far as they are booked."""
        return int(self._state.replica[0, 0]["iteration"])

    def follow(self, engine: EngineName) -> None:
        """Form steps by the rules of this engine from now on."""
        self._params.engine[0] = ENGINES.index(engine)

    def come(
        self,
        tokens: tuple[int, int, int, int],
        names: Sequence[int],
        key: float,
        arrival_s: float,
        now_s: float,
    ) -> int:
        """Let a request arrive; see `cluster.live.come`.

        Args:
            tokens: Of prompt and answer, of the answer so far, and found in the cache or -1.
            names: Contents of its full KV blocks.
            key: Its key where the engine goes by priorities.
            arrival_s: Orders requests of equal keys.
            now_s: Time, seconds.

        Returns:
            Its place.
        """
        if not self._places:
            self._grow()
        place = self._places.pop()
        rows = (0, 0)
        if self._caching:
            self._state = self._segments.add(self._state, place, names)
            rows = self._segments.rows(place)
        come(self._params, self._state, place, arrival_s, key, tokens, rows, now_s)
        return place

    def leave(self, place: int) -> None:
        """Give the place of a request that has ended, or is lost, to others."""
        self._segments.drop(place)
        self._places.append(place)

    def abort(self, place: int, now_s: float) -> None:
        """Take a request out of the engine and give its place to others."""
        abort(self._params, self._state, 0, place, now_s)
        self.leave(place)

    def turn(self) -> Turn:
        """Do what is due: end the step or stretch in progress, and begin the next."""
        turn(self._params, self._state, self._report)
        report = self._report[: REPORT_HEAD + self._report[NUM_COMPUTED]].tolist()
        events: list[Event] = []
        if report[NUM_LOGGED]:
            events = [Event(*e) for e in self._state.log[0, : report[NUM_LOGGED]].tolist()]
        skipped = self._skipped() if report[NUM_SKIPPED] else []
        return Turn(events, report[REPORT_HEAD:], skipped, report[FORMED])

    def _skipped(self) -> list[int]:
        forming = self._state.forming[0, 0]
        found = [int(forming["skipped_from"])]
        while len(found) < forming["num_skipped"]:
            found.append(int(self._state.request[0, found[-1]]["next_request"]))
        return found

    def foresee(self, told: int) -> tuple[int, list[float]]:
        """Say how many steps of the stretch in progress are ahead, and when the next of them end.

        Args:
            told: Steps in which decoding requests took part that the caller knows to have ended.
        """
        ahead = foresee(self._params, self._state, told, self._times_s)
        return ahead, self._times_s[:ahead].tolist()

    def held_blocks(self, told: int) -> int:
        """Count the KV blocks that are held after so many steps."""
        return held_blocks(self._params, self._state, told)

    def speed_up(self, multiplier: float, now_s: float) -> None:
        """Let steps that begin from now on be faster than nominal by a factor."""
        speed_up(self._params, self._state, multiplier, now_s)

    def postpone(self, next_s: float, until_s: float) -> None:
        """Let what was to end or begin at a time do so at another; what follows, as much later."""
        postpone(self._params, self._state, next_s, until_s)

    def fail(self, now_s: float) -> None:
        """Lose all requests, the cache and the step in progress; the caller calls `leave`."""
        fail(self._params, self._state, now_s)

    def fetch(self, place: int) -> None:
        """Let the KV of a request come from elsewhere, which has just joined the queue."""
        fetch(self._params, self._state, place)

    @property
    def next_landing_s(self) -> float:
        """When the next KV arrives, infinite if none is on its way."""
        return float(next_landing_s(self._state))

    def land_due(self, now_s: float) -> list[Event]:
        """Let the KV arrive that is due; return events that say whose."""
        land_due(self._params, self._state, now_s)
        return [Event(*e) for e in self._state.log[0, : self._state.env[0]["log_len"]].tolist()]

    def set_other_end(self, type_idx: int, free_s: float) -> None:
        """Say from what kind of replica KV comes next, and when its link is free.

        Args:
            type_idx: Among `other_ends`.
            free_s: Seconds.
        """
        self._state.replica["type_idx"][0, OTHER_END] = 1 + type_idx
        self._state.link["out_free_s"][0, OTHER_END] = free_s

    def other_end_free_s(self) -> float:
        """When the link is free of the replica from which KV came last."""
        return float(self._state.link["out_free_s"][0, OTHER_END])

    def release_kept(self, place: int, now_s: float) -> None:
        """Give back what a prefilled request holds, and its place to others."""
        release_kept(self._params, self._state, place, now_s)
        self.leave(place)

    def withdraw(self, place: int, now_s: float) -> None:
        """Take a request out whose KV was to come, and give its place to others."""
        withdraw(self._params, self._state, place, now_s)
        self._state.transfer["source"][0, place] = -1
        self.leave(place)

    def _grow(self) -> None:
        """Make twice as many places."""
        state, size = self._state, self._state.request.shape[1]

        def twice(name: str) -> np.ndarray:
            old = getattr(state, name)
            return np.concatenate((old, np.zeros_like(old)), axis=1)

        self._state = state._replace(**{name: twice(name) for name in self._per_request})
        if "transfer" in self._per_request:
            self._stay(size)
        self._places = list(range(size, 2 * size))[::-1]

    def _stay(self, first: int) -> None:
        """Of the requests that come to places from this one on, no KV is elsewhere."""
        moving = self._state.transfer[0, first:]
        for name in ("source", "prefill_on", "target"):
            moving[name] = -1
        moving["lease_until_s"] = np.inf


def rehearse(kind: ReplicaType) -> None:
    """Call every kernel once: what is not loaded, or compiled, yet would make steps late."""
    core = EngineCore(
        replace(kind, engine="vllm", num_blocks=64),
        block_size=16,
        prefix_caching=True,
        chunked_prefill=True,
        speed=1.0,
        noise=NO_NOISE,
    )
    places = [core.come((1, 2, 0, -1), [], 0.0, float(i), 0.0) for i in range(2)]
    core.turn()
    core.foresee(0)
    core.held_blocks(0)
    core.abort(places[0], 0.0)
    core.speed_up(2.0, 0.0)
    core.postpone(1.0, 2.0)
    core.fail(0.0)
