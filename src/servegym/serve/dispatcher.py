"""One object for every way in: arrivals and outcomes go in, decisions come out.

The router, Ray Serve, LiteLLM and plain Python code all use it. It owns the state, the policy,
the prefix index, the length predictor and the decision log, and is not for several threads.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.cluster.spec import SloClass
from servegym.errors import unknown_name
from servegym.policy.contract import OUTSTANDING_REQUESTS, Group, observed
from servegym.policy.online import OnlinePolicy
from servegym.policy.policy import Observations
from servegym.serve.decision_log import (
    TRACE_BLOCK_TOKENS,
    DecisionLog,
    DecisionLogConfig,
    finite,
    logged_action,
)
from servegym.serve.job import Job
from servegym.serve.loaded_policy import LoadedPolicy
from servegym.serve.placing import Placing
from servegym.serve.requests.prediction import LengthPrediction, LengthPredictor
from servegym.serve.requests.prefix_index import PrefixIndex
from servegym.serve.requests.prompt import PrefixConfig, Prompt, PromptReader, Size
from servegym.serve.requests.recent_ends import RecentEnds
from servegym.serve.runtime import Decision, PolicyRuntime, RuntimeConfig
from servegym.serve.state import EngineMetrics, LiveState
from servegym.serve.ties import TieBreaker, counts_replicas
from servegym.typing import BoolArray, FloatArray

#: Features that rest on the prefix index.
_BY_PREFIX = Group.PREFIX | Group.LIMITS
Status = Literal["finished", "rejected", "cancelled", "failed"]


class SloConfig(BaseModel):
    """A service level; limits may be left out.

    Attributes:
        name: Clients and tenants name it.
        ttft_s: Limit of the time to the first token.
        tpot_s: Limit of the time per output token after the first.
        weight: Worth of meeting them.
        priority: Of its requests where they wait for a replica with room; higher goes first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    ttft_s: float | None = Field(None, gt=0)
    tpot_s: float | None = Field(None, gt=0)
    weight: float = Field(1.0, ge=0)
    priority: int = 0


class DispatchConfig(BaseModel):
    """Everything that decides where requests go.

    Attributes:
        runtime: The policy, its fallback and its guards.
        slo_classes: Service levels; the first is the default.
        allow_hold: Whether the policy may hold a request.
        allow_reject: Whether the policy may reject a request.
        prediction: Of output lengths.
        prefix: How prompts are read.
        log: The decision log, if there is one.
        seed: Of the order in which equally good replicas get requests; `None`: another for every
            dispatcher, so that several of one fleet do not all prefer the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    runtime: RuntimeConfig = RuntimeConfig()
    slo_classes: tuple[SloConfig, ...] = Field((SloConfig(name="default"),), min_length=1)
    allow_hold: bool = False
    allow_reject: bool = False
    prediction: LengthPrediction = LengthPrediction()
    prefix: PrefixConfig = PrefixConfig()
    log: DecisionLogConfig | None = None
    seed: int | None = Field(None, ge=0)


class Reconsidered(NamedTuple):
    """Where a request would go now, instead of where it waits.

    Attributes:
        action: Slot of the replica.
        row: Of the decision log, if there is one.
    """

    action: int
    row: dict[str, Any] | None


class Dispatcher:
    """Decides for a fleet and keeps its books.

    The fleet may change at any time (`add`, `remove`). Every replica has a slot, by which it is
    known here; policies see the replicas that there are, without gaps.

    Args:
        config: See `DispatchConfig`.
        replicas: Names of those that are there at first, in slots 0, 1, ...
        facts: Static rows of each, `float64[NUM_NOMINAL, R]`; see `serve.facts.fleet_facts`.
        clock: Seconds that never go back; `time.monotonic` if it is not given.

    Attributes:
        names: Of the replicas, by slot; empty for a free slot.
        state: The live state.
        runtime: The policy runtime.
        index: The prefix index.
        predictor: Of output lengths.
        log: The decision log, if there is one.
        placing: Where requests decode that are prefilled on their own.

    Raises:
        ServeGymError: If a part of the configuration cannot be used.
    """

    def __init__(
        self,
        config: DispatchConfig,
        replicas: Sequence[str],
        facts: FloatArray,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.config = config
        self.names = list(replicas)
        assert len(self.names) == facts.shape[1]
        self.clock = clock = clock or time.monotonic
        # of all wall times: arrivals keep their distances where the wall clock is set anew
        self._epoch_s = time.time() - clock()
        classes = [
            SloClass(c.name, c.ttft_s or math.inf, c.tpot_s or math.inf, c.weight)
            for c in config.slo_classes
        ]
        self.state = LiveState(
            facts, classes, allow_hold=config.allow_hold, allow_reject=config.allow_reject
        )
        self.runtime = PolicyRuntime(config.runtime)
        self.runtime.meet(self.state.replicas)
        self.placing = Placing(self)
        self.predictor = LengthPredictor(config.prediction)
        self.reader = PromptReader(config.prefix)
        self.index = PrefixIndex([0] * len(self.names))
        self._share = config.prefix.share_of_cache
        self._ties = TieBreaker(config.seed)
        for slot in range(len(self.names)):
            self._size_index(slot)
            self._ties.add(slot)
        self._class_idx = {c.name: i for i, c in enumerate(config.slo_classes)}
        self.log = DecisionLog(config.log) if config.log else None
        max_ends = config.log.max_ends if config.log else 0
        self._ends = RecentEnds(max_ends) if max_ends else None
        # of the policy in place: what is read, and whether the prefix index is
        self._needed: tuple[LoadedPolicy | None, Group, bool] | None = None

    def add(self, name: str, facts: FloatArray) -> int:
        """A replica joins the fleet.

        Args:
            name: For the log.
            facts: Its static rows, `float64[NUM_NOMINAL]`; see `serve.facts.replica_facts`. All
                speeds must be in one unit.

        Returns:
            Its slot: where it is in arrays by replica, and what `decide` calls it.
        """
        slot = self.state.add(facts)
        if slot == len(self.names):
            self.names.append(name)
            self.index.grow()
        self.names[slot] = name
        self._size_index(slot)
        self._ties.add(slot)
        self._meet()
        return slot

    def remove(self, slot: int) -> None:
        """A replica has left the fleet, after its last request; its slot is free for another."""
        self.state.remove(slot)
        self.placing.transfers.forget(slot)
        self.names[slot] = ""
        self.index.clear(slot)
        self.index.resize(slot, 0)
        self._ties.remove(slot)
        self._meet()

    def slots(self) -> list[int]:
        """Return the slots that have a replica, in order: the order that the log counts in."""
        return np.flatnonzero(self.state.in_use).tolist()

    def slo_class(self, name: str | None) -> int:
        """Return the index of a service level; the default's for `None`.

        Raises:
            ValueError: If there is none of that name.
        """
        if name is None:
            return 0
        if name not in self._class_idx:
            raise ValueError(unknown_name("SLO class", name, self._class_idx))
        return self._class_idx[name]

    def arrive(
        self,
        prompt: Prompt | Size | str | Sequence[int],
        *,
        key: str,
        tenant: str = "default",
        slo_class: int = 0,
        max_tokens: int | None = None,
        model: str = "",
        session: str | None = None,
    ) -> Job:
        """Note that a request has arrived, and make its job.

        Args:
            prompt: Its text or token ids, or what `reader` made of them.
            key: Names the request; the canary's share is drawn by it.
            tenant: Who asks.
            slo_class: Index of the service level.
            max_tokens: What the client allows, if it says so.
            model: By which it is asked for, if by any: another one, or another adapter, has
                cached nothing of the same prompt.
            session: Name of the conversation or agent's run that it belongs to, if the client
                gives one; for the log, which says what a request followed.
        """
        measured = prompt if isinstance(prompt, Prompt) else self.reader.read(prompt)
        request = self.state.arrive(
            self.clock(),
            key=key,
            prompt_tokens=measured.tokens,
            predicted_output_tokens=self.predictor.predict(tenant, slo_class, max_tokens),
            slo_class=slo_class,
        )
        job = Job(
            request,
            measured.kept_for(model),
            tenant,
            model,
            self._epoch_s + request.arrival_s,
        )
        if self._ends is not None:
            job.mark, job.follows = self._ends.arrive(measured, tenant, session, request.arrival_s)
        return job

    def decide(
        self,
        job: Job,
        *,
        allowed: BoolArray | None = None,
        may_hold: bool = True,
        with_scores: bool = False,
    ) -> Decision:
        """Decide, and book the dispatch, the hold or the rejection.

        A job that is at a replica is taken back first: that is a retry. One that goes to a replica
        that only prefills is to be placed then, see `placing`.

        Args:
            job: From `arrive`.
            allowed: Replicas in question, by slot, `bool[W]`; `None`: all that are up.
            may_hold: Whether it may be held (again).
            with_scores: Whether to ask the policy once more, for what it gives each choice.

        Returns:
            Its actions are slots, W to hold, and W + 1 to reject.
        """
        request = job.request
        self._take_back(job)
        now_s = self.clock()
        transfers = self.placing.transfers
        if transfers.are_possible:
            transfers.see(None, now_s)
        needs, by_prefix = self.needs()
        seen = self.state.observe(
            request,
            now_s,
            hit_tokens=self.hits(job) if by_prefix else None,
            allowed=allowed,
            may_hold=may_hold,
            needs=needs,
        )
        decision = self.choose(seen, request.key, with_scores=with_scores)
        if self.log is not None:
            job.decisions.append(self._decision_row(job, decision, now_s, seen))
        if decision.action < self.state.num_slots:
            apart = transfers.only_prefills(decision.action)
            if not apart and (learner := self._learner) is not None:
                there, place = seen.replicas[0][:, self.state.in_use], self._place(decision.action)
                learner.chosen(0, request, there, seen.request[0], place, now_s)
            if apart:
                self.placing.begin(job, decision.action, now_s)
            else:
                self.state.dispatch(request, decision.action, now_s)
            self._ties.chose(decision.action)
            if math.isnan(job.first_dispatch_s):
                job.first_dispatch_s = now_s
        elif decision.action == self.state.num_slots:
            self.state.hold(request)
        else:
            self.end(job, "rejected")
        return decision

    def reconsider(self, job: Job, allowed: BoolArray, margin: int) -> Reconsidered | None:
        """Say where a request would go now that waits at a replica; nothing is booked.

        Args:
            job: At a replica that has sent no token.
            allowed: Replicas in question, by slot, `bool[W]`.
            margin: Requests that the other replica must have fewer.

        Returns:
            The decision for another replica; `None` if it would stay, or not gain so much.
        """
        request, here, now_s = job.request, job.request.replica, self.clock()
        if not allowed.any():
            return None
        needs, by_prefix = self.needs()
        with self.state.without(request):
            seen = self.state.observe(
                request,
                now_s,
                hit_tokens=self.hits(job) if by_prefix else None,
                allowed=allowed,
                may_hold=False,
                needs=needs,
            )
            mask = seen.mask.copy()
            mask[0, -2:] = False
            seen = Observations(seen.replicas, seen.request, mask)
            decision = self.choose(seen, request.key)
            there = decision.action
            outstanding = self.state.replicas[OUTSTANDING_REQUESTS]
            gain = outstanding[here] - outstanding[there]  # requests of other routers, too
            if there == here or gain < margin:
                return None
            row = None if self.log is None else self._decision_row(job, decision, now_s, seen)
            return Reconsidered(there, row)

    def requeue(self, job: Job, there: Reconsidered) -> None:
        """Book that a request goes where it would go now."""
        if there.row is not None:
            job.decisions.append(there.row)
        self.moved(job, there.action)
        self._ties.chose(there.action)

    def wait(self, job: Job) -> None:
        """Put a request on hold because no replica can take it; nothing is decided."""
        self._take_back(job)
        self.state.hold(job.request)

    def moved(self, job: Job, replica: int) -> None:
        """Another replica than the chosen one has taken a request: whoever sent it tried again."""
        self._take_back(job)
        self.state.dispatch(job.request, replica, self.clock())

    def end_prefill(self, job: Job) -> None:
        """The prompt is computed, as far as is known or assumed."""
        if job.request.prefill_is_pending:
            self.index.add(job.replica, job.prompt.keys)
            self.state.end_prefill(job.request)
        elif job.moving is not None:
            self.placing.landed(job)

    def first_token(self, job: Job) -> None:
        """The first token has come."""
        self.end_prefill(job)
        now_s, is_first = self.clock(), math.isnan(job.request.first_token_s)
        self.state.first_token(job.request, now_s)
        if is_first and (learner := self._learner) is not None:
            learner.first_token(0, job.request, now_s)

    def tokens(self, job: Job, count: int, now_s: float | None = None) -> None:
        """So many more output tokens have come, now if no time is given."""
        self.state.tokens(job.request, count, self.clock() if now_s is None else now_s)

    def prefill_left_s(self, job: Job) -> float:
        """Seconds until the prompt of a request should be computed, or its KV have come."""
        if job.moving is not None:
            return self.placing.transfers.left_s(job.moving, self.clock())
        return self.state.prefill_left_s(job.request.replica)

    def usage(self, job: Job, *, prompt_tokens: int, cached_tokens: int | None = None) -> None:
        """An engine has said how long the prompt was."""
        job.reported_prompt_tokens = prompt_tokens
        job.cached_tokens = cached_tokens
        self.reader.learn(job.prompt, prompt_tokens)

    def answered(self, job: Job) -> None:
        """The client has the whole answer: it may send the next request before `finish`."""
        if self._ends is not None and job.mark is not None:
            self._ends.add(job.mark, job.request.key, self.clock())
            job.mark = None

    def finish(self, job: Job, output_tokens: int) -> None:
        """A request has all its tokens.

        Args:
            job: Of the request.
            output_tokens: How many there are.
        """
        self.end_prefill(job)
        self.answered(job)
        row = self._row(job, "finished", output_tokens)
        now_s = self.clock()
        self.state.finish(job.request, now_s, output_tokens)
        if (learner := self._learner) is not None:
            first_s = job.request.first_token_s
            learner.ended(
                0, job.request, first_token_s=first_s, finish_s=now_s, tokens=output_tokens
            )
        if output_tokens > 0:
            self.predictor.learn(job.tenant, job.request.slo_class, output_tokens)
        self._write(job, row)

    def end(self, job: Job, status: Status) -> None:
        """A request is gone without all its tokens; does nothing after its end."""
        if job.ended:
            return
        row = self._row(job, status, job.request.generated_tokens)
        self.state.leave(job.request)
        self.placing.give_up(job)
        if (learner := self._learner) is not None:
            learner.gone(0, job.request)
        self._write(job, row)

    def update_metrics(self, replica: int, metrics: EngineMetrics, asked_s: float) -> None:
        """Note what an engine says of itself; `asked_s` is of this dispatcher's clock."""
        self.state.update_metrics(replica, metrics, asked_s)
        if self.index.capacity(replica) == 0:
            self._size_index(replica)

    def close(self) -> None:
        """Write what is left of the log."""
        if self.log is not None:
            self.log.close()

    def choose(
        self, seen: Observations, key: str, *, with_scores: bool = False, placing: bool = False
    ) -> Decision:
        """Let the runtime decide, equally good replicas in turn; nothing is booked.

        Args:
            seen: A batch of one, by slot.
            key: Of the request.
            with_scores: Whether to ask the policy once more, for what it gives each choice.
            placing: Whether it is about where a request decodes that is prefilled on its own.

        Returns:
            Its actions are slots, W to hold, and W + 1 to reject.
        """
        counts = any(map(counts_replicas, self.runtime.deciders(placing=placing)))
        shown, order = self._ties.show(seen, in_turn=not counts)
        decision = self.runtime.decide(shown, key, placing=placing)
        proposed = decision.proposed
        scores = None
        if with_scores and proposed is not None:
            given = self.runtime.scores(shown)
            if given is not None:
                scores = np.full(self.state.num_slots + 2, -np.inf)
                scores[order] = given
        return Decision(  # _replace takes thrice as long
            int(order[decision.action]),
            decision.by,
            decision.reason,
            decision.duration_s,
            None if proposed is None else int(order[proposed]),
            decision.propensity,
            scores,
        )

    def _meet(self) -> None:
        """The fleet is another one; who remembers replicas by their place begins anew."""
        runtime = self.runtime
        runtime.meet(self.state.replicas)
        for policy in (*runtime.deciders(), *runtime.deciders(placing=True)):
            if counts_replicas(policy):
                policy.reset(1, runtime.config.seed)

    def _place(self, action: int) -> int:
        """Return an action as the log has it: replicas count among those that there are."""
        num_slots = self.state.num_slots
        if action >= num_slots:
            return logged_action(action, num_slots)
        return int(self.state.in_use[:action].sum())

    def _take_back(self, job: Job) -> None:
        if job.request.replica >= 0 or job.moving is not None:
            job.num_retries += 1
            self.state.leave(job.request)
            self.placing.give_up(job)
            job.prefill = None

    def _size_index(self, replica: int) -> None:
        tokens = self.state.kv_capacity_tokens(replica) * self._share
        self.index.resize(replica, int(tokens // self.config.prefix.block_tokens))

    @property
    def _learner(self) -> OnlinePolicy | None:
        """The policy, if it learns while it serves, whether it decides or not."""
        loaded = self.runtime.loaded
        return loaded.policy if loaded and isinstance(loaded.policy, OnlinePolicy) else None

    def needs(self) -> tuple[Group, bool]:
        """Groups of features that whoever may decide reads; whether the index is read for them."""
        loaded = self.runtime.loaded
        if self._needed is None or self._needed[0] is not loaded:
            needs = Group(0)
            for policy in (*self.runtime.deciders(), *self.runtime.deciders(placing=True)):
                needs |= policy.needs
            self._needed = loaded, needs, bool(needs & _BY_PREFIX)
        return self._needed[1:]

    def hits(self, job: Job) -> FloatArray | None:
        """Tokens believed cached; the last token of a prompt is always computed."""
        prompt = job.prompt
        if not len(prompt.keys):
            return None
        blocks = self.index.leading_blocks(prompt.keys)
        hits = blocks * prompt.block_tokens
        whole = (prompt.tokens - 1.0) // prompt.block_tokens * prompt.block_tokens
        return np.minimum(hits, max(0.0, whole))

    def _decision_row(
        self, job: Job, decision: Decision, now_s: float, seen: Observations
    ) -> dict[str, Any]:
        loaded = self.runtime.loaded
        row: dict[str, Any] = {
            "after_s": now_s - job.request.arrival_s,
            "action": self._place(decision.action),
            "replica_name": self.names[decision.action]
            if decision.action < self.state.num_slots
            else None,
            "by": decision.by,
            "reason": decision.reason.value,
            "duration_s": decision.duration_s,
            "proposed": None if decision.proposed is None else self._place(decision.proposed),
            "propensity": decision.propensity,
            "policy": loaded.version if loaded else None,
            "observation": None,
        }
        assert self.config.log is not None
        if self.config.log.observations:
            shape = observed(extended=False)
            there = self.state.in_use
            columns = seen.replicas[0][: shape.replicas, there]
            shown = np.nan_to_num(columns, nan=-1.0, posinf=1e9)
            asked = np.nan_to_num(seen.request[0, : shape.request], nan=-1.0, posinf=1e9)
            row["observation"] = {
                "replicas": shown.T.tolist(),
                "request": asked.tolist(),
                "mask": [*seen.mask[0, :-2][there].tolist(), *seen.mask[0, -2:].tolist()],
            }
        return row

    def _row(self, job: Job, status: Status, output_tokens: int) -> dict[str, Any] | None:
        if self.log is None:
            return None
        request, now_s = job.request, self.clock()
        tokens = output_tokens
        if status != "finished":  # how long it would have become is not known
            tokens = max(output_tokens, round(request.predicted_output_tokens))
        every = max(1, round(TRACE_BLOCK_TOKENS / job.prompt.block_tokens))
        return {
            "key": request.key,
            "arrival_s": job.wall_s,
            "prompt_tokens": int(job.reported_prompt_tokens or job.prompt.tokens),
            "output_tokens": max(1, tokens),
            "predicted_output_tokens": request.predicted_output_tokens,
            "cached_tokens": job.cached_tokens,
            "slo_class": request.slo_class,
            "slo_class_name": self.config.slo_classes[request.slo_class].name,
            "tenant": zlib.crc32(job.tenant.encode()) & 0x7FFFFFFF,
            "tenant_name": job.tenant,
            "model": job.model,
            "hash_ids": job.prompt.keys[every - 1 :: every].tolist(),
            "status": status,
            "replica": self._place(request.replica) if request.replica >= 0 else -1,
            "replica_name": self.names[request.replica] if request.replica >= 0 else None,
            "dispatch_s": finite(job.first_dispatch_s - request.arrival_s),
            "ttft_s": finite(request.first_token_s - request.arrival_s),
            "e2e_s": now_s - request.arrival_s,
            "num_retries": job.num_retries,
            "follows": None if job.follows is None else job.follows._asdict(),
            "decisions": job.decisions,
            "prefill_replica_name": job.prefill.replica if job.prefill else None,
            "prefilled_s": job.prefill.after_s if job.prefill else None,
            "placements": job.placements,
        }

    def _write(self, job: Job, row: dict[str, Any] | None) -> None:
        job.ended = True
        if self.log is not None and row is not None:
            self.log.put(row)
