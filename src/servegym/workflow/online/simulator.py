"""The compiled online simulator behind a Python face: many environments at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from servegym.cluster.jit import kernel
from servegym.errors import InvalidAction
from servegym.typing import IntArray
from servegym.workflow.job import Job
from servegym.workflow.online.allocate import Capacity, load_episode, make_params, make_state
from servegym.workflow.online.kernels import advance, apply, is_allowed
from servegym.workflow.online.loading import load_jobs
from servegym.workflow.online.outcome import (
    DEVICE_OUTCOME_DTYPE,
    JOB_OUTCOME_DTYPE,
    STAGE_OUTCOME_DTYPE,
)
from servegym.workflow.online.pool import Pool, make_pool
from servegym.workflow.online.spec import Episode, FleetSpec, require_runnable
from servegym.workflow.online.state import DONE, STAGE_DTYPE, Params, State
from servegym.workflow.online.view import View, can_start, look, view


@kernel
def _advance_all(p: Params, s: State, reasons: IntArray) -> None:
    for e in range(reasons.shape[0]):
        reasons[e] = advance(p, s, e)


@kernel
def _apply_all(p: Params, s: State, actions: IntArray) -> int:
    """Apply the actions of all environments that wait for one; return the first bad one or -1."""
    for e in range(actions.shape[0]):
        if s.env[e].deciding != 0 and not is_allowed(p, s, e, actions[e]):
            return e
    for e in range(actions.shape[0]):
        if s.env[e].deciding != 0:
            apply(p, s, e, actions[e])
    return -1


@kernel
def _startable(p: Params, s: State, e: int, out: IntArray) -> int:
    """Write the allowed starts, by stage in order of the ready list, then by device."""
    env, count = s.env[e], 0
    for i in range(env.num_ready):
        stage = s.ready[e, i]
        for d in range(env.num_devices):
            if can_start(view(p, s, e), stage, d):
                out[count] = stage * env.num_devices + d
                count += 1
    return count


class Snapshot(NamedTuple):
    """A simulator at one moment; see `Simulator.snapshot`."""

    state: State
    capacity: Capacity
    episodes: tuple[Episode, ...]
    reasons: IntArray


class Simulator:
    """Independent fleets under the same rules, one episode each.

    Actions are integers: `stage * num_devices + device` starts a ready stage (numbered through all
    jobs of the episode in order of arrival) on a device, `state.WAIT` lets time pass until
    something has happened.

    Attributes:
        spec: Device types and rules.
        params: The same, as arrays.
        state: All that changes, as arrays.
        episodes: What each environment is playing.
        reasons: What `advance` last said of each environment, `int64[num_envs]`.
    """

    def __init__(self, spec: FleetSpec, episodes: Sequence[Episode]) -> None:
        self.spec = spec
        self.params = make_params(spec)
        self._pools: dict[int, tuple[tuple[Job, ...], Pool, set[frozenset[int]]]] = {}
        for episode in episodes:
            episode.validate(spec)
        self.episodes = list(episodes)
        self._capacity = Capacity.of(episodes)
        self.state = make_state(spec, self._capacity)
        self.reasons = np.full(len(episodes), DONE, np.int64)
        for env, episode in enumerate(episodes):
            load_episode(self.params, self._pool(episode), self.state, env, episode)

    @property
    def num_envs(self) -> int:
        """Number of environments."""
        return self._capacity.num_envs

    def load(self, env: int, episode: Episode) -> None:
        """Start another episode in one environment; the arrays grow if it needs more room."""
        episode.validate(self.spec)
        pool = self._pool(episode)
        if not self._capacity.covers(episode):
            self._grow(episode)
        self.episodes[env] = episode
        self.reasons[env] = DONE  # no decision is due before it has been advanced
        load_episode(self.params, pool, self.state, env, episode)

    def _pool(self, episode: Episode) -> Pool:
        """Pack the jobs of an episode, once for all episodes with the same tuple of jobs."""
        key = id(episode.jobs)
        if key not in self._pools:
            if len(self._pools) >= 2 * len(self.episodes) + 2:  # jobs drawn anew every time
                self._pools.clear()
            pool = make_pool(episode.jobs, len(self.spec.task_types))
            self._pools[key] = (episode.jobs, pool, set())  # holding the jobs keeps the id
        jobs, pool, fleets = self._pools[key]
        types = frozenset(episode.type_idx.tolist())
        if types not in fleets:
            for job in jobs:
                require_runnable(self.spec, job, sorted(types))
            fleets.add(types)
        return pool

    def _grow(self, episode: Episode) -> None:
        need = Capacity.of([episode])
        merged = Capacity(self.num_envs, *map(max, self._capacity[1:], need[1:]))
        bigger = make_state(self.spec, merged)
        old: Any
        new: Any
        for old, new in zip(self.state, bigger, strict=True):
            new[tuple(slice(size) for size in old.shape)] = old
        self.state, self._capacity = bigger, merged

    def tell_truth(self) -> None:
        """Let expected values be the true ones and hide nothing, as oracles want it.

        For a simulator that has been loaded, but not advanced.
        """
        for env, episode in enumerate(self.episodes):
            self.state.env[env]["oracle"] = 1
            order = np.ascontiguousarray(episode.order, np.int64)
            load_jobs(self.params, self._pool(episode), self.state, env, order)

    def advance(self) -> IntArray:
        """Run every environment until a decision is due or all its jobs have ended.

        Returns:
            `DECISION` or `DONE` per environment, `int64[num_envs]`.
        """
        _advance_all(self.params, self.state, self.reasons)
        return self.reasons.copy()

    def view(self, env: int = 0) -> View:
        """Return what a scheduler sees of one environment; arrays, not copies."""
        return look(self.params, self.state, env)

    def startable(self, env: int = 0) -> IntArray:
        """Return the starts that are allowed now, as actions, by falling rank of the stage."""
        row = self.state.env[env]
        out = np.empty(int(row["num_ready"]) * int(row["num_devices"]), np.int64)
        return out[: _startable(self.params, self.state, env, out)]

    def apply(self, actions: IntArray) -> None:
        """Take the decisions that are due.

        Args:
            actions: `stage * num_devices + device` or `WAIT` per environment, `int64[num_envs]`;
                ignored where no decision is due.

        Raises:
            InvalidAction: If an action is not allowed; then none has been taken.
        """
        bad = _apply_all(self.params, self.state, np.ascontiguousarray(actions, np.int64))
        if bad >= 0:
            raise InvalidAction(self.refusal(bad, int(actions[bad])))

    def refusal(self, env: int, action: int) -> str:
        """Say why an action is not allowed."""
        if action < 0:
            return (
                f"environment {env} cannot wait: nothing is running and nothing will arrive, so"
                " start one of its ready stages"
            )
        stage, device = divmod(action, int(self.state.env[env]["num_devices"]))
        some = [divmod(a, self.episodes[env].num_devices) for a in self.startable(env)[:8].tolist()]
        return (
            f"stage {stage} cannot start on device {device} of environment {env} now: choose one"
            f" of the {len(self.startable(env))} allowed (stage, device), such as {some}"
        )

    def stages(self, env: int = 0) -> NDArray[np.void]:
        """Return what became of every stage, `STAGE_OUTCOME_DTYPE[num_stages]`."""
        rows = self.state.stage[env, : int(self.state.env[env]["num_stages"])]
        out = np.zeros(len(rows), STAGE_OUTCOME_DTYPE)
        for column in STAGE_OUTCOME_DTYPE.names or ():
            if column in (STAGE_DTYPE.names or ()):
                out[column] = rows[column]
        out["cached_tokens"] = rows["hit"]
        out["stage"] = np.arange(len(rows)) - self.state.job["first_stage"][env][rows["job"]]
        out["prompt_tokens"] = rows["prompt"]
        out["output_tokens"] = self.state.truth["output"][env, : len(rows)]
        return out

    def jobs(self, env: int = 0) -> NDArray[np.void]:
        """Return what became of every job, `JOB_OUTCOME_DTYPE[num_jobs]`."""
        rows = self.state.job[env, : int(self.state.env[env]["num_jobs"])]
        out = np.zeros(len(rows), JOB_OUTCOME_DTYPE)
        out["job"] = np.arange(len(rows))
        out["job_idx"] = self.episodes[env].order
        for column in ("template", "arrival_s", "finish_s", "deadline_s", "weight", "num_stages"):
            out[column] = rows[column]
        return out

    def devices(self, env: int = 0) -> NDArray[np.void]:
        """Return how much every device did, `DEVICE_OUTCOME_DTYPE[num_devices]`."""
        rows = self.state.device[env, : int(self.state.env[env]["num_devices"])]
        out = np.zeros(len(rows), DEVICE_OUTCOME_DTYPE)
        out["device"] = np.arange(len(rows))
        for column in ("type_idx", "busy_s", "slot_s"):
            out[column] = rows[column]
        return out

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
