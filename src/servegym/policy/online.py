"""Policies that learn while they serve, from the requests that have ended.

Whoever carries decisions out, the simulator's run or a live dispatcher, tells such a policy which
replica each request went to, and later how it fared there. Nothing is learned before: it begins
with nothing, and forgets everything when it is reset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from servegym.cluster.entry import INFER
from servegym.cluster.simulator import Simulator
from servegym.policy.contract import Group
from servegym.policy.policy import Information, Observations
from servegym.typing import BoolArray, FloatArray, IntArray


class Fared(NamedTuple):
    """How a request fared.

    Attributes:
        seen: What was seen of the choice, see `Learner.describe`.
        tpot_s: Per output token after the first; NaN if there is none.
        e2e_s: From the decision to its end.
    """

    seen: FloatArray
    tpot_s: float
    e2e_s: float


class Learner(ABC):
    """What decides and learns for one router."""

    @abstractmethod
    def decide(self, replicas: FloatArray, request: FloatArray, mask: BoolArray) -> int:
        """Choose a replica of those allowed, at least one; see `policy.rule` for the arrays."""

    @abstractmethod
    def describe(self, replicas: FloatArray, request: FloatArray, r: int) -> FloatArray:
        """Return what is to be kept of the choice of a replica until its request has ended."""

    @abstractmethod
    def learn_ttft(self, seen: FloatArray, ttft_s: float) -> None:
        """Take in when the first token of a request came.

        Args:
            seen: What was seen of the choice.
            ttft_s: From the decision to the token.
        """

    @abstractmethod
    def learn(self, fared: Fared) -> None:
        """Take in how a request fared that has ended."""


class _Decided(NamedTuple):
    seen: FloatArray
    now_s: float


@dataclass
class OnlinePolicy:
    """A `Policy` with a learner for each environment; a live router is one environment.

    Attributes:
        name: Name in tables.
        information: Information class.
        needs: Feature groups it reads.
        make_learner: Makes what knows nothing yet, of the parameters and a seed.
        params: Its tunable numbers, `float64[p]`.
        param_names: Their names.
        reference: Where the rule comes from.
    """

    name: str
    information: Information
    needs: Group
    make_learner: Callable[[FloatArray, int], Learner]
    params: FloatArray
    param_names: tuple[str, ...]
    reference: str = ""
    _learners: list[Learner] = field(default_factory=list, init=False, repr=False)
    _decided: list[dict[Hashable, _Decided]] = field(default_factory=list, init=False, repr=False)

    def reset(self, num_envs: int, seed: int) -> None:
        """Forget everything."""
        seeds = np.random.SeedSequence(seed).generate_state(num_envs)
        self._learners = [self.make_learner(self.params, int(x)) for x in seeds]
        self._decided = [{} for _ in range(num_envs)]

    def act(self, observations: Observations, env_ids: IntArray) -> IntArray:
        """Decide; see `Policy.act`."""
        actions = np.empty(len(env_ids), np.int64)
        for row, env in enumerate(env_ids.tolist()):
            mask = observations.mask[row]
            if mask[:-2].any():
                replicas, request = observations.replicas[row], observations.request[row]
                actions[row] = self._learners[env].decide(replicas, request, mask)
            else:
                actions[row] = len(mask) - 2 if mask[-2] else len(mask) - 1
        return actions

    def chosen(
        self,
        env: int,
        key: Hashable,
        replicas: FloatArray,
        request: FloatArray,
        r: int,
        now_s: float,
    ) -> None:
        """A request has gone to a replica, whoever has decided that.

        Args:
            env: The environment.
            key: Names the request.
            replicas: What was seen, `float64[F, R]`,
            request: and of the request, `float64[G]`.
            r: The replica.
            now_s: When.
        """
        seen = self._learners[env].describe(replicas, request, r)
        self._decided[env][key] = _Decided(seen, now_s)

    def first_token(self, env: int, key: Hashable, now_s: float) -> None:
        """The first token of a request has come, after it went where it is."""
        decided = self._decided[env].get(key)
        if decided is not None:
            self._learners[env].learn_ttft(decided.seen, now_s - decided.now_s)

    def ended(
        self, env: int, key: Hashable, *, first_token_s: float, finish_s: float, tokens: int
    ) -> None:
        """A request has all its tokens.

        Args:
            env: The environment.
            key: Names the request; one that is not known is nobody's.
            first_token_s: When its first token came,
            finish_s: and its last one.
            tokens: How many came.
        """
        decided = self._decided[env].pop(key, None)
        if decided is None:
            return
        seen, now_s = decided
        tpot_s = (finish_s - first_token_s) / (tokens - 1) if tokens > 1 else np.nan
        self._learners[env].learn(Fared(seen, tpot_s, finish_s - now_s))

    def gone(self, env: int, key: Hashable) -> None:
        """A request has left without all its tokens: nothing is learned from it."""
        self._decided[env].pop(key, None)


class SimulatorTold:
    """Tells a policy what a simulator does with its decisions.

    Args:
        simulator: Before its episodes begin.
        policy: Who is told.
    """

    def __init__(self, simulator: Simulator, policy: OnlinePolicy) -> None:
        simulator.require(INFER)  # as only then what has ended is listed
        self._simulator, self._policy = simulator, policy
        self._last = [-1] * simulator.num_envs
        self._waiting: list[list[int]] = [[] for _ in range(simulator.num_envs)]

    def tell_news(self) -> None:
        """Tell of first tokens, and of requests that have ended, since the last call."""
        for env, waiting in enumerate(self._waiting):
            self._tell_first_tokens(env, waiting)
        self._tell_ended()

    def _tell_first_tokens(self, env: int, waiting: list[int]) -> None:
        state = self._simulator.state
        times_s = state.request["first_token_s"][env, waiting]
        come = np.flatnonzero(times_s <= state.env["now_s"][env])
        for place in come[np.argsort(times_s[come], kind="stable")].tolist():
            self._policy.first_token(env, waiting[place], float(times_s[place]))
        for place in come[::-1].tolist():
            del waiting[place]

    def _tell_ended(self) -> None:
        state = self._simulator.state
        for env, last in enumerate(self._last):
            following = int(
                state.env[env]["first_ended"] if last < 0 else state.length[env, last]["next_ended"]
            )
            while following >= 0:
                request = state.request[env, following]
                self._policy.ended(
                    env,
                    following,
                    first_token_s=float(request["first_token_s"]),
                    finish_s=float(request["finish_s"]),
                    tokens=int(request["output"]),
                )
                self._last[env] = following
                following = int(state.length[env, following]["next_ended"])

    def tell_chosen(self, observations: Observations, envs: IntArray, actions: IntArray) -> None:
        """Tell which replicas got the requests that are being decided about."""
        state = self._simulator.state
        for row, env in enumerate(envs.tolist()):
            r = int(actions[row])
            if r < observations.replicas.shape[2]:
                at = state.env[env]
                request = int(at["deciding"])
                if np.isnan(state.request[env, request]["first_token_s"]):
                    if request not in self._waiting[env]:
                        self._waiting[env].append(request)
                self._policy.chosen(
                    env,
                    request,
                    observations.replicas[row],
                    observations.request[row],
                    r,
                    float(at["now_s"]),
                )
