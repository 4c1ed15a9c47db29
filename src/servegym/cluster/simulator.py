"""The compiled simulator behind a Python face: many environments, stepped to their decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import typeof
from numpy.typing import NDArray

from servegym.cluster.allocate import (
    Capacity,
    load_episode,
    make_params,
    make_state,
    wanted_entries,
)
from servegym.cluster.entry import addresses
from servegym.cluster.jit import fixed, kernel
from servegym.cluster.kernels import advance, apply, may_answer
from servegym.cluster.outcome import JUDGED_DTYPE, OUTCOME_DTYPE, SOURCE_COLUMNS
from servegym.cluster.spec import ClusterSpec, Episode
from servegym.cluster.state import (
    DISPATCH,
    DISPATCH_ONLY,
    DONE,
    DROP,
    KEEP,
    LEAVE,
    LOG_FULL,
    MIGRATE,
    NO_DECISION,
    NOBODY,
    NUM_RETENTIONS,
    OFFLOAD,
    REJECTED,
    RETAIN,
    Asks,
    Params,
    State,
)
from servegym.errors import InvalidAction
from servegym.typing import IntArray
from servegym.workloads.table import BY_ITSELF


@kernel
def _advance_all(p: Params, s: State, reasons: IntArray) -> None:
    for e in range(reasons.shape[0]):
        reasons[e] = advance(p, s, e)


@kernel
def _apply_all(p: Params, s: State, answers: IntArray) -> int:
    """Answer all environments that wait; return the first one with a bad answer or -1."""
    for e in range(answers.shape[0]):
        if s.env[e].decision != NO_DECISION and not may_answer(p, s, e, answers[e]):
            return e
    for e in range(answers.shape[0]):
        if s.env[e].decision != NO_DECISION:
            apply(p, s, e, answers[e])
    return -1


class Snapshot(NamedTuple):
    """A simulator at one moment; see `Simulator.snapshot`."""

    state: State
    capacity: Capacity
    episodes: tuple[Episode, ...]
    reasons: IntArray


class Simulator:
    """Independent clusters under the same rules, one episode each.

    Args:
        spec: The rules and replica types.
        episodes: What each environment plays.
        record: Whether to write the event log, the step log and the ITL histogram.
        max_replicas: Replica columns, if there are to be more than the episodes need.
        asks: Which decisions are asked for.

    Attributes:
        spec: The rules and replica types.
        params: The same, as arrays.
        state: All that changes, as arrays.
        episodes: What each environment is playing.
        reasons: What `advance` last said of each environment, `int64[num_envs]`.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        episodes: Sequence[Episode],
        *,
        record: bool = False,
        max_replicas: int = 0,
        asks: Asks = DISPATCH_ONLY,
    ) -> None:
        for episode in episodes:
            episode.validate(spec)
        self.spec = spec
        self.episodes = list(episodes)
        self.params = make_params(spec, record=record, asks=asks)
        self._capacity = Capacity.of(spec, episodes, max_replicas=max_replicas, record=record)
        self.state = make_state(spec, self._capacity)
        self._on_demand = wanted_entries(spec, asks)
        self._find_entries()
        self.reasons = np.zeros(len(episodes), np.int64)
        self.scratch: object = None  # working memory of planners, see policy.what_if
        for env, episode in enumerate(episodes):
            load_episode(self.params, self.state, env, episode)

    def _find_entries(self) -> None:
        types = typeof(self.params), typeof(self.state)
        self.params.entries[:] = addresses(*types, self._on_demand)

    def require(self, place: int) -> None:
        """See that an entry point of `entry.ON_DEMAND` is there from now on."""
        if place not in self._on_demand:
            self._on_demand |= {place}
            self._find_entries()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._find_entries()  # compiled code lies elsewhere in another process

    @property
    def num_envs(self) -> int:
        """Number of environments."""
        return self._capacity.num_envs

    @property
    def max_replicas(self) -> int:
        """Replica columns in the arrays; an episode may use fewer."""
        return self._capacity.replicas

    def load(self, env: int, episode: Episode) -> None:
        """Start another episode in one environment; the arrays grow if it needs more room."""
        episode.validate(self.spec)
        if not self._capacity.covers(self.spec, episode):
            self._grow(episode)
        self.episodes[env] = episode
        self.reasons[env] = DONE  # no decision is due before it has been advanced
        load_episode(self.params, self.state, env, episode)

    def _grow(self, episode: Episode) -> None:
        need = Capacity.of(self.spec, [episode], record=bool(self.params.record))
        merged = self._capacity.grown_to(need)
        arrays: list[Any] = []
        old: Any
        new: Any
        for old, new in zip(self.state, make_state(self.spec, merged), strict=True):
            if new.shape == old.shape:
                arrays.append(old)  # the memory of the new one has not been touched
                continue
            new[tuple(slice(size) for size in old.shape)] = old
            arrays.append(new)
        bigger = State._make(arrays)
        width = self._capacity.replicas
        if bigger.allowed is not self.state.allowed:
            bigger.allowed[:, width:] = False  # hold and reject stand behind all replicas
            bigger.allowed[:, -2:] = self.state.allowed[:, -2:]
        self.state, self._capacity = bigger, merged

    def advance(self) -> IntArray:
        """Run every environment until a decision is due or all its requests have ended.

        Returns:
            `DECISION` or `DONE` per environment, `int64[num_envs]`.
        """
        advance_all = fixed(_advance_all, self.params, self.state, self.reasons)
        advance_all(self.params, self.state, self.reasons)
        while (self.reasons == LOG_FULL).any():
            self.grow_logs()
            advance_all(self.params, self.state, self.reasons)
        return self.reasons.copy()

    def grow_logs(self) -> None:
        """Double the room of the event and step logs."""
        size = self._capacity.log
        logs = {}
        for name in ("log", "steps"):
            old = getattr(self.state, name)
            logs[name] = np.concatenate((old, np.zeros_like(old)), axis=1)
        self.state = self.state._replace(**logs)
        self._capacity = self._capacity._replace(log=2 * size)

    def apply(self, answers: IntArray) -> None:
        """Take the decisions that are due.

        Args:
            answers: What `kernels.apply` takes, for a dispatch an index of `State.allowed`, per
                environment, `int64[num_envs]`; ignored where no decision is due.

        Raises:
            InvalidAction: If an answer is not allowed, or there is not one per environment; then
                none has been given.
        """
        answers = np.ascontiguousarray(answers, np.int64)
        if answers.shape != self.reasons.shape:
            raise InvalidAction(
                f"answers must have shape {self.reasons.shape}, one per environment, got "
                f"{answers.shape}"
            )
        bad = fixed(_apply_all, self.params, self.state, answers)(self.params, self.state, answers)
        if bad >= 0:
            env = self.state.env[bad]
            stop, others = int(env["num_requests"]), f"requests; {NOBODY}: nobody"
            if env["decision"] == DISPATCH:
                width = self.max_replicas
                stop, others = width + 2, f"{width} holds, {width + 1} rejects"
            if env["decision"] == MIGRATE:
                stop *= self.max_replicas
                others = f"request times {self.max_replicas} plus replica; {NOBODY}: nobody"
            if env["decision"] == RETAIN:
                stop = NUM_RETENTIONS
                others = f"{DROP} drops, {LEAVE} leaves, {OFFLOAD} offloads, {KEEP} keeps"
            allowed = [a for a in range(-2, stop) if may_answer(self.params, self.state, bad, a)]
            raise InvalidAction(
                f"action {int(answers[bad])} of environment {bad} is not allowed now: "
                f"choose one of {allowed} ({others})"
            )

    def judged(self, env: int = 0) -> NDArray[np.void]:
        """Return of every request what metrics of an episode need, `JUDGED_DTYPE[n]`."""
        arrived = int(self.state.env[env]["next_arrival"])
        request = self.state.request[env, : int(self.state.env[env]["num_requests"])]
        out = np.empty(len(request), JUDGED_DTYPE)
        for column in ("arrival_s", "first_token_s", "finish_s", "slo_class"):
            out[column] = request[column]
        out["arrival_s"][arrived:][request["after"][arrived:] == BY_ITSELF] = np.nan
        out["output_tokens"] = request["output"]
        out["rejected"] = request["status"] == REJECTED
        return out

    def outcomes(self, env: int = 0) -> NDArray[np.void]:
        """Return the fate of every request, `OUTCOME_DTYPE[n]`."""
        judged = self.judged(env)
        request = self.state.request[env, : len(judged)]
        out = np.zeros(len(request), OUTCOME_DTYPE)
        for name in judged.dtype.names or ():
            out[name] = judged[name]
        out["request"] = np.arange(len(request))
        for column in ("dispatch_s", "scheduled_s"):
            out[column] = request[column]
        out["prompt_tokens"] = request["prompt"]
        out["cached_tokens"] = np.maximum(request["cached"], 0)
        for column in ("replica", "num_preemptions", "num_restarts", "num_holds"):
            out[column] = request[column]
        out["tenant"] = self.episodes[env].table.tenant
        out["prefill_replica"] = -1
        for column in ("prefilled_s", "transfer_s", "landed_s"):
            out[column] = np.nan
        if self.spec.moves_kv:
            way = self.state.transfer[env, : len(request)]
            out["transfer_s"] = way["begin_s"]
            for column in (
                "prefill_replica",
                "prefilled_s",
                "landed_s",
                "moved_bytes",
                "num_migrations",
                "num_stays",
                "paused_s",
            ):
                out[column] = way[column]
        if self.spec.tiered:
            load = self.state.load[env, : len(request)]
            out["transfer_s"] = np.fmax(out["transfer_s"], load["begin_s"])
            out["landed_s"] = np.fmax(out["landed_s"], load["landed_s"])
            out["moved_bytes"] += load["moved_bytes"]
            out["stored_bytes"] = load["stored_bytes"]
            for source, column in enumerate(SOURCE_COLUMNS):
                out[column] = load["tokens"][:, source]
        return out

    def events(self, env: int = 0) -> NDArray[np.void]:
        """Return the event log in order of time, `EVENT_DTYPE[m]`; empty unless recorded."""
        return self.state.log[env, : int(self.state.env[env]["log_len"])].copy()

    def steps(self, env: int = 0) -> NDArray[np.void]:
        """Return the step log in order of step ends, `STEP_DTYPE[m]`; empty unless recorded."""
        logged = self.state.steps[env, : int(self.state.env[env]["step_len"])]
        # a stretch is logged when it is settled, which can be after later steps of other replicas
        return logged[np.argsort(logged["end_s"], kind="stable")]

    def itl_histogram(self, env: int = 0) -> IntArray:
        """Return counts of inter-token times in the log bins of `state`, `int64[bins]`."""
        return self.state.itl_count[env].copy()

    def snapshot(self) -> Snapshot:
        """Copy everything that changes."""
        state = State._make(array.copy() for array in self.state)
        return Snapshot(state, self._capacity, tuple(self.episodes), self.reasons.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this simulator, whatever has been played or loaded since."""
        self.state = State._make(array.copy() for array in snapshot.state)
        self._capacity = snapshot.capacity
        self.episodes = list(snapshot.episodes)
        self.reasons = snapshot.reasons.copy()
