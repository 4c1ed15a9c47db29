"""The policy runtime: one request's observation in, a guarded decision out."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from servegym.errors import ConfigError, ServeGymError
from servegym.export.resolve import DISPATCH_SUFFIXES
from servegym.policy.contract import (
    METRICS_AGE_S,
    NO_BOUND,
    NUM_OBSERVED_FEATURES,
    NUM_REPLICA_FEATURES,
    NUM_REQUEST_FEATURES,
)
from servegym.policy.exploration import explore
from servegym.policy.policy import Observations, Policy, Scoring
from servegym.serve.guards import (
    FAULTS,
    BreakerConfig,
    Circuit,
    CircuitBreaker,
    Counters,
    Reason,
    Silence,
)
from servegym.serve.loaded_policy import LoadedPolicy, is_allowed, load_policy, reads_metrics
from servegym.serve.monitoring.prometheus import Histogram
from servegym.typing import BoolArray, FloatArray

_log = logging.getLogger(__name__)

Mode = Literal["live", "shadow"]
#: Upper bounds of the decision-latency histogram, seconds.
LATENCY_BOUNDS_S = (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
_ENV = np.zeros(1, np.int64)


class RuntimeConfig(BaseModel):
    """Which policy decides, who steps in for it, and when.

    Attributes:
        policy: A rule (`"added-delay:prefill=1.9"`) or the path of a `policy.onnx` or `score.json`;
            where replicas have roles `"DISPATCH+PLACEMENT"`, or the path of a `placed.npz`.
        fallback: The rule that decides whenever the policy may not; it may have two parts, too.
        require_policy: Refuse to start without the policy; else the fallback decides until a
            reload brings a good one.
        mode: `live` acts by the policy, `shadow` only watches it.
        canary_fraction: Share of the requests, told by their keys, that the policy decides.
        explored: Share of the policy's choices in place of which a replica is drawn evenly from
            those allowed, so that its log can say what other policies would have done.
        timeout_s: A slower decision counts as a fault of the policy. A decision takes a hundredth
            of the default; the rest is room for a machine that is busy with other things.
        max_metrics_age_s: Older engine metrics of an allowed replica are stale.
        range_margin: A feature is far from training if it is outside the range its manifest
            states by more than so many widths of that range; see `serve.ranges`.
        max_features_out: With more features than this far from training the fallback decides.
        silent_after_decisions: It is said, loudly, when the state has kept the policy from being
            asked so many times in a row.
        breaker: Of the circuit breaker.
        seed: Of rules that draw, and of what is explored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    policy: str = "added-delay"
    fallback: str = "least-outstanding"
    require_policy: bool = True
    mode: Mode = "live"
    canary_fraction: float = Field(1.0, ge=0, le=1)
    explored: float = Field(0.0, ge=0, le=1)
    timeout_s: float = Field(0.02, gt=0)
    max_metrics_age_s: float = Field(5.0, gt=0)
    range_margin: float = Field(1.0, ge=0)
    max_features_out: int = Field(3, ge=0)
    silent_after_decisions: int = Field(100, ge=1)
    breaker: BreakerConfig = BreakerConfig()
    seed: int = Field(0, ge=0)


class Decision(NamedTuple):
    """What to do with a request, and why.

    Attributes:
        action: Index into the mask: of R replicas one, R to hold or R + 1 to reject.
        by: Whose choice it is.
        reason: Why that one decided.
        duration_s: Wall-clock seconds from the observation to the decision.
        proposed: What the policy answered, where it was asked and did not fail.
        propensity: Probability of the action, where the policy decided and explores.
        scores: What the policy gave each action, `float64[R + 2]`, -inf where it gave none; only
            where that was asked for, and the policy is one that scores.
    """

    action: int
    by: Literal["policy", "fallback"]
    reason: Reason
    duration_s: float
    proposed: int | None
    propensity: float | None = None
    scores: FloatArray | None = None


class PolicyRuntime:
    """Decides for one request at a time, whatever happens to the policy.

    Not for use from several threads at once; `prepare` may run in another thread.

    Args:
        config: What to load and when to trust it.
        clock: Seconds that never go back, for the breaker and for durations.

    Attributes:
        config: As given.
        mode: `live` or `shadow`; may be changed.
        canary_fraction: May be changed.
        loaded: The policy in place, if there is one.
        fallback: The rule that decides when the policy may not.
        place_fallback: That which then decides where requests decode.
        counters: Decisions by reason.
        breaker: The circuit breaker.
        latency: Seconds per decision.
        features_out: How often each feature was far from training, by name.
        silence: Notices a policy that is never asked.
        condition: Raises a `ServeGymError` for a policy that may not decide here; may be set.

    Raises:
        ConfigError: If the fallback, or a policy by name, is unknown or cannot be live.
        ExportError: If the policy's file is not valid.
    """

    def __init__(
        self, config: RuntimeConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.config = config
        self.mode: Mode = config.mode
        self.canary_fraction = config.canary_fraction
        self.counters = Counters()
        self.breaker = CircuitBreaker(config.breaker)
        self.latency = Histogram(LATENCY_BOUNDS_S)
        self.features_out: dict[str, int] = {}
        self.silence = Silence(config.silent_after_decisions)
        self.condition: Callable[[LoadedPolicy], None] = lambda loaded: None
        self.clock = clock
        self._turn = 0
        self._explorer = np.random.default_rng(config.seed)
        self._fleet: FloatArray | None = None
        self.loaded: LoadedPolicy | None = None
        if config.fallback.endswith(DISPATCH_SUFFIXES):
            raise ConfigError(f"the fallback must be a rule by name, got {config.fallback!r}")
        safe = load_policy(config.fallback, config)
        self.fallback, self.place_fallback = safe.policy, safe.place
        if reads_metrics(self.fallback):
            _log.warning("the fallback %s reads engine metrics itself", config.fallback)
        try:
            self.loaded = self.prepare(config.policy)
        except ServeGymError as error:
            if config.require_policy:
                raise
            self.counters.num_refused += 1
            _log.error("%s; %s decides", error, config.fallback)

    def prepare(self, text: str) -> LoadedPolicy:
        """Load and try a policy without putting it in place; takes up to seconds."""
        loaded = load_policy(text, self.config)
        self.condition(loaded)
        return loaded

    def install(self, loaded: LoadedPolicy) -> None:
        """Put a policy in place, between two decisions; the breaker starts afresh."""
        if self.loaded is not None:
            self.counters.num_reloads += 1
        self.loaded = loaded
        self.breaker.reset()
        self.silence.reset()
        self._announce_strangers()

    def meet(self, fleet: FloatArray) -> None:
        """Learn which fleet is decided for; a policy that can never decide for it is announced.

        Args:
            fleet: Replica rows of its observations, `float64[NUM_REPLICA_FEATURES, R]`, which may
                change under the runtime.
        """
        self._fleet = fleet
        self._announce_strangers()

    def never_decides(self) -> str | None:
        """Say why the policy can never decide for this fleet, if so: what stays is too far off."""
        loaded = self.loaded
        if loaded is None or loaded.ranges is None or self._fleet is None:
            return None
        far = loaded.ranges.far_facts(self._fleet)
        if len(far) <= self.config.max_features_out:
            return None
        return (
            f"{loaded.text} can never decide for this fleet: {', '.join(far)} are far from its "
            f"training, and at most {self.config.max_features_out} features may be "
            "(max_features_out): correct the replicas' hardware or rates, or train on such a fleet"
        )

    def _announce_strangers(self) -> None:
        if reason := self.never_decides():
            _log.error("%s; %s decides", reason, self.config.fallback)

    def reload(self, text: str | None = None) -> LoadedPolicy:
        """Load a policy, by default the same again, and put it in place.

        Raises:
            ServeGymError: If it fails its checks; then the old one stays.
        """
        current = self.loaded.text if self.loaded else self.config.policy
        try:
            loaded = self.prepare(text or current)
        except ServeGymError:
            self.counters.num_refused += 1
            raise
        self.install(loaded)
        return loaded

    def deciders(self, *, placing: bool = False) -> tuple[Policy, ...]:
        """Return the fallback and, if there is one, the policy; of placings if that is asked."""
        loaded = self.loaded
        if placing:
            return (self.place_fallback, *([loaded.place] if loaded else ()))
        return (self.fallback, *([loaded.policy] if loaded else ()))

    def decide(
        self, observations: Observations, key: str = "", *, placing: bool = False
    ) -> Decision:
        """Decide for one request; never raises.

        Args:
            observations: A batch of one. Metrics that were never seen have an age of `NO_BOUND`.
            key: Of the request; the same key is always inside or outside of the canary's share.
            placing: Whether it is about where a request decodes that is prefilled on its own.
        """
        begin_s = self.clock()
        proposed: int | None = None
        reason = self._forbidden(observations) or self._choose_side(key, begin_s)
        if self._is_asked(reason, begin_s):
            doubt = self._doubt(observations, placing=placing)
            if doubt is not None:
                reason = doubt
                if self.silence.kept_out():
                    self._announce_silence(doubt)
            else:
                if num_missed := self.silence.asked():
                    _log.warning("the policy is asked again, after %d decisions", num_missed)
                proposed, fault = self._ask(observations, begin_s, placing=placing)
                reason = fault or reason
        by: Literal["policy", "fallback"] = "fallback"
        propensity: float | None = None
        if proposed is not None and (reason is None or self._may_be_late(reason, begin_s)):
            action, by = proposed, "policy"
            reason = reason or Reason.POLICY
            if (share := self.config.explored) and not placing:
                mask = observations.mask[0]
                action, propensity = explore(proposed, mask, share, self._explorer)
                if reason is Reason.POLICY and action != proposed:
                    reason = Reason.EXPLORED
        else:
            assert reason is not None
            action, reason = self._fall_back(observations, reason, placing=placing)
        duration_s = self.clock() - begin_s
        self._count(by, action, proposed, reason, duration_s)
        return Decision(action, by, reason, duration_s, proposed, propensity)

    def scores(self, observations: Observations) -> FloatArray | None:
        """Return what the policy gives each action, `float64[R + 2]`; `None` if it gives nothing.

        Args:
            observations: A batch of one, about which the policy has just been asked.
        """
        policy = self.loaded.policy if self.loaded else None
        return policy.scores(observations) if isinstance(policy, Scoring) else None

    def _announce_silence(self, doubt: Reason) -> None:
        assert self.loaded is not None
        out = sorted(self.features_out, key=lambda name: -self.features_out[name])
        _log.error(
            "%s has not been asked in %d decisions in a row: %s%s; %s decides",
            self.loaded.text,
            self.silence.num_in_row,
            doubt.value,
            f" ({', '.join(out[:8])})" if doubt is Reason.OUT_OF_RANGE else "",
            self.config.fallback,
        )

    def _forbidden(self, observations: Observations) -> Reason | None:
        """Say why no policy can decide this, if so."""
        replicas, request, mask = observations
        if (
            replicas.ndim != 3
            or replicas.shape[:2] != (1, NUM_REPLICA_FEATURES)
            or request.shape != (1, NUM_REQUEST_FEATURES)
            or mask.shape != (1, replicas.shape[2] + 2)
        ):
            return Reason.SCHEMA
        if not np.count_nonzero(mask[0, :-2]):
            return Reason.FORCED
        return Reason.NO_POLICY if self.loaded is None else None

    def _is_asked(self, reason: Reason | None, now_s: float) -> bool:
        """Whether the policy is asked, be it to act or to be watched."""
        if reason is Reason.BREAKER:
            return self.breaker.state(now_s) is Circuit.HALF_OPEN
        return reason is None or reason is Reason.SHADOW

    def _may_be_late(self, reason: Reason, now_s: float) -> bool:
        """Whether a late answer is acted on: asking another now would only be later."""
        on_trial = self.mode == "shadow" or self.breaker.state(now_s) is not Circuit.CLOSED
        return reason is Reason.TIMEOUT and not on_trial

    def _choose_side(self, key: str, now_s: float) -> Reason | None:
        if self.breaker.state(now_s) is not Circuit.CLOSED:
            return Reason.BREAKER
        if self.mode == "shadow":
            return Reason.SHADOW
        if self.canary_fraction < 1.0 and not in_share(key, self.canary_fraction):
            return Reason.CANARY
        return None

    def _doubt(self, observations: Observations, *, placing: bool) -> Reason | None:
        """Say why the policy should not judge by what is seen, if so."""
        loaded = self.loaded
        assert loaded is not None
        replicas, request = observations.replicas[0], observations.request[0]
        if loaded.placing_reads_metrics if placing else loaded.reads_metrics:
            oldest_s = replicas[METRICS_AGE_S].max(
                where=observations.mask[0, :-2], initial=0.0
            )  # NaN is found below
            if oldest_s >= NO_BOUND:
                return Reason.MISSING
            if oldest_s > self.config.max_metrics_age_s:
                return Reason.STALE
        shown = replicas[:NUM_OBSERVED_FEATURES]
        if not (np.isfinite(shown).all() and np.isfinite(request).all()):
            return Reason.NAN
        if loaded.ranges is not None and not placing:
            far = loaded.ranges.far(observations)
            for name in far:
                self.features_out[name] = self.features_out.get(name, 0) + 1
            if len(far) > self.config.max_features_out:
                return Reason.OUT_OF_RANGE
        return None

    def _ask(
        self, observations: Observations, begin_s: float, *, placing: bool
    ) -> tuple[int | None, Reason | None]:
        """Ask the policy; return its answer, if it is one, and its fault, if any."""
        assert self.loaded is not None
        fault: Reason | None = None
        action: int | None = None
        try:
            policy = self.loaded.place if placing else self.loaded.policy
            action = int(policy.act(observations, _ENV)[0])
        except Exception:
            _log.exception("%s failed", self.loaded.text)
            fault = Reason.ERROR
        now_s = self.clock()
        if action is not None and not is_allowed(action, observations.mask[0]):
            action, fault = None, Reason.INVALID
        if fault is None and now_s - begin_s > self.config.timeout_s:
            fault = Reason.TIMEOUT
        num_opened = self.breaker.num_opened
        self.breaker.record(fault in FAULTS, now_s)
        if self.breaker.num_opened > num_opened:
            text, fallback = self.loaded.text, self.config.fallback
            _log.error("%s is out of service after faults (%s): %s decides", text, fault, fallback)
        return action, fault

    def _fall_back(
        self, observations: Observations, reason: Reason, *, placing: bool
    ) -> tuple[int, Reason]:
        mask = observations.mask[0]
        if reason in (Reason.SCHEMA, Reason.FORCED):
            return self._last_resort(mask), reason
        try:
            if not np.isfinite(observations.replicas).all():
                finite = np.nan_to_num(observations.replicas, nan=0.0, posinf=1e9, neginf=0.0)
                request = np.nan_to_num(observations.request, nan=0.0, posinf=1e9, neginf=0.0)
                observations = Observations(finite, request, observations.mask)
            fallback = self.place_fallback if placing else self.fallback
            action = int(fallback.act(observations, _ENV)[0])
            if is_allowed(action, mask):
                return action, reason
        except Exception:
            _log.exception("the fallback %s failed", self.config.fallback)
        return self._last_resort(mask), Reason.LAST_RESORT

    def _last_resort(self, mask: BoolArray) -> int:
        """Take the allowed replicas in turn: no rule is simpler, and none needs less."""
        hold = len(mask) - 2
        allowed = np.flatnonzero(mask[:hold])
        if len(allowed):
            self._turn += 1
            return int(allowed[self._turn % len(allowed)])
        return hold if hold >= 0 and mask[hold] else hold + 1

    def _count(
        self, by: str, action: int, proposed: int | None, reason: Reason, duration_s: float
    ) -> None:
        counters = self.counters
        counters.by_reason[reason] += 1
        if by == "policy":
            counters.num_policy += 1
        else:
            counters.num_fallback += 1
            if proposed is not None:
                counters.num_agreed += proposed == action
                counters.num_differed += proposed != action
        self.latency.observe(duration_s)

    def status(self) -> dict[str, object]:
        """Return what an operator wants to know, as plain values."""
        now_s = self.clock()
        return {
            "policy": self.loaded.text if self.loaded else None,
            "version": self.loaded.version if self.loaded else None,
            "fallback": self.config.fallback,
            "mode": self.mode,
            "canary_fraction": self.canary_fraction,
            "breaker": self.breaker.state(now_s).name.lower(),
            "breaker_opened": self.breaker.num_opened,
            "kept_out_in_row": self.silence.num_in_row,
            "counters": self.counters.snapshot(),
            "features_out": dict(self.features_out),
        }


def in_share(key: str, fraction: float) -> bool:
    """Whether a key belongs to a fraction of all keys; a larger fraction keeps those of a smaller.

    Args:
        key: Any text.
        fraction: 0 to 1.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64
