"""Playing whole episodes under a dispatch policy and a rule for the KV of ended turns."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

from servegym.cluster.simulator import Simulator
from servegym.cluster.spec import ClusterSpec, Episode, ReplicaType
from servegym.cluster.state import DECISION, DONE, RETAIN, STORE, WHERE_IT_MATTERS, Asks
from servegym.errors import ConfigError
from servegym.policy.contract import Group
from servegym.policy.observe import observe_batch
from servegym.policy.policy import Heuristic, Observations
from servegym.policy.retention import Kept, Turn
from servegym.policy.run import require_whole_requests, run_compiled, tell_truth
from servegym.typing import FloatArray

#: Of gaps that a rule is shown, the latest so many.
_MOST_GAPS = 256


def make_simulator(
    spec: ClusterSpec, episodes: list[Episode], *, record: bool = False
) -> Simulator:
    """Make a simulator that asks what becomes of the KV of ended turns.

    Raises:
        ConfigError: If nothing is kept of them anyway, or requests move between replicas.
    """
    check_retention(spec, "a retention rule", "take the dispatch policy alone")
    return Simulator(spec, episodes, record=record, asks=Asks(retain=WHERE_IT_MATTERS))


def check_retention(spec: ClusterSpec, what: str, instead: str) -> None:
    """Refuse clusters where nobody can say what becomes of the KV of ended turns.

    Args:
        spec: The cluster.
        what: Who would say it, at the beginning of a sentence.
        instead: What to do, at its end.
    """
    if spec.disaggregated or spec.migrates:
        raise ConfigError(
            f"{what} and requests that move between replicas do not go together yet: {instead}, or "
            "take a cluster in which none moves"
        )
    if not spec.prefix_caching:
        raise ConfigError(
            f"{what} is about blocks of the prefix cache, which is off: turn it on, or {instead}"
        )


def run_kept(simulator: Simulator, policy: Kept, seed: int = 0) -> None:
    """Drive every environment of a simulator to the end of its episode.

    Args:
        simulator: Freshly made by `make_simulator`.
        policy: Decides; it is reset first.
        seed: Of the policy's own randomness.
    """
    require_whole_requests(simulator, policy)
    policy.reset(simulator.num_envs, seed)
    tell_truth(simulator, policy.dispatch.information)
    turns = [Turns(simulator, env) for env in range(simulator.num_envs)]
    compiled = isinstance(policy.dispatch, Heuristic) and not policy.needs & Group.WHAT_IF
    while True:
        if compiled:
            assert isinstance(policy.dispatch, Heuristic)
            run_compiled(simulator, policy.dispatch)
        elif (simulator.advance() == DONE).all():
            return
        due = simulator.reasons == DECISION
        if not due.any():
            return
        answers = np.zeros(simulator.num_envs, np.int64)
        asked = due & (simulator.state.env["decision"] == RETAIN)
        for env in np.flatnonzero(asked).tolist():
            turn = turns[env].due(tell=policy.retention.information == "oracle")
            answers[env], keep_s = policy.retention.retain(turn)
            simulator.state.env["keep_s"][env] = keep_s
        if (due & ~asked).any():
            observations, envs = observe_batch(simulator, policy.needs)
            rows = ~asked[envs]
            seen = Observations(*(part[rows] for part in observations))
            answers[envs[rows]] = policy.act(seen, envs[rows])
        simulator.apply(answers)


class Turns:
    """The turns of one environment: which have ended, and when the next ones came.

    Args:
        simulator: Freshly loaded.
        env: Which of its environments.
    """

    def __init__(self, simulator: Simulator, env: int) -> None:
        self._simulator, self._env = simulator, env
        self._table = simulator.episodes[env].table
        self._tool = self._table.tool
        self._ended: list[int] = []
        self._gaps_s: dict[int, list[float]] = defaultdict(list)
        self._curves = [_recompute_curve(kind) for kind in simulator.spec.types]

    def due(self, *, tell: bool) -> Turn:
        """Return the turn that is to be decided; `tell` when the next one will come."""
        simulator, env = self._simulator, self._env
        spec, state = simulator.spec, simulator.state.env[env]
        request = int(state["deciding"])
        row = simulator.state.request[env, request]
        kind_idx = int(simulator.episodes[env].type_idx[int(state["asking"])])
        kind = spec.types[kind_idx]
        now_s = float(state["now_s"])
        self._learn(now_s)
        self._ended.append(int(row["first_after"]))
        tool = int(self._tool[row["first_after"]])
        tokens = int(row["table_len"]) * spec.block_size
        known, seconds = self._curves[kind_idx]
        replica = simulator.state.replica[env, int(state["asking"])]
        return Turn(
            now_s=now_s,
            kept_tokens=tokens,
            kv_share=int(row["table_len"]) / kind.num_blocks,
            recompute_s=float(np.interp(tokens, known, seconds)),
            tiered=any((kind.host_kv, kind.disk_kv, spec.tiers.store)),
            tool=tool,
            gaps_s=np.array(self._gaps_s[tool][-_MOST_GAPS:]),
            back_s=self._back_s(request) if tell else math.nan,
            free_share=int(replica["free_blocks"] - replica["kept_blocks"]) / kind.num_blocks,
            num_waiting=int(replica["num_waiting"]),
            host_share=self._first_tier_share(int(state["asking"]), kind_idx),
            writing_s=max(0.0, float(replica["slowed_until_s"]) - now_s),
        )

    def _first_tier_share(self, replica: int, kind_idx: int) -> float:
        """Share of a replica's first tier that is filled, 0 without one."""
        sizes = self._simulator.params.tier_num_blocks[kind_idx]
        tier = int(np.argmax(sizes > 0))
        if not sizes[tier]:
            return 0.0
        state = self._simulator.state
        own = state.tier[self._env, replica, tier]["num_blocks"]
        filled = state.env[self._env]["store_num_blocks"] if tier == STORE else own
        return float(filled / sizes[tier])

    def _learn(self, now_s: float) -> None:
        """Note the gaps of turns whose next ones have come."""
        if not self._ended:
            return
        following = np.array(self._ended)
        rows = self._simulator.state.request[self._env, following]
        came = rows["arrival_s"] <= now_s
        for i in following[came].tolist():
            before = self._simulator.state.request[self._env, int(self._table.after[i])]
            arrival_s = float(self._simulator.state.request[self._env, i]["arrival_s"])
            self._gaps_s[int(self._tool[i])].append(arrival_s - float(before["finish_s"]))
        self._ended = following[~came].tolist()

    def _back_s(self, request: int) -> float:
        """Seconds until the first of those that wait for a request comes."""
        return float(self._table.delay_s[self._table.after == request].min())


def _recompute_curve(kind: ReplicaType) -> tuple[FloatArray, FloatArray]:
    """Seconds of the steps that compute a text alone, at so many tokens."""
    budget = kind.max_num_batched_tokens
    ends = np.arange(0, 65, dtype=np.float64) * budget
    steps = [kind.grid.step_s([(budget, int(done))]) for done in ends[:-1]]
    return ends, np.concatenate(([0.0], np.cumsum(steps)))
