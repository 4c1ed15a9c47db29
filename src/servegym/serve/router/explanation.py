"""A decision in words and numbers, for whoever traces the request that it is about."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np

from servegym.policy.contract import OUTSTANDING_REQUESTS
from servegym.serve.dispatcher import Dispatcher
from servegym.serve.job import Job
from servegym.typing import BoolArray, FloatArray


class Explanation(NamedTuple):
    """A decision; nothing in it changes later, so that it can go to another process.

    Attributes:
        action: Name of the replica, or `hold` or `reject`.
        by: Who decided.
        reason: Why it was they.
        proposed: What the policy answered, where it was asked and did not fail.
        propensity: Probability of the action, where the policy decided and explores.
        policy: Version of the one in place.
        candidates: Names of the replicas in question.
        outstanding: Requests of each of those before.
        scores: What the policy gives each of those, where it is one that scores.
        probabilities: Of each of those, that the scores make.
        attempts_before: Replicas that have failed the request before.
        model: That the request is for.
        slo_class: Name of its service level.
        prompt_tokens: Of the request, as estimated.
        predicted_output_tokens: Of the request.
        end_ns: When it had been taken, nanoseconds since 1970.
        duration_s: From the observation to the decision, seconds.
        about: `dispatch`, or `placement`: where it decodes, being prefilled elsewhere.
    """

    action: str
    by: str
    reason: str
    proposed: str | None
    propensity: float | None
    policy: str
    candidates: tuple[str, ...]
    outstanding: tuple[float, ...]
    scores: tuple[float, ...] | None
    probabilities: tuple[float, ...] | None
    attempts_before: int
    model: str
    slo_class: str
    prompt_tokens: float
    predicted_output_tokens: float
    end_ns: int
    duration_s: float
    about: str = "dispatch"


def decide_explained(
    dispatcher: Dispatcher,
    job: Job,
    *,
    allowed: BoolArray,
    may_hold: bool,
    attempts: int,
    placing: bool = False,
) -> Explanation:
    """Decide, and say among whom and why.

    Args:
        dispatcher: Decides.
        job: Of the request.
        allowed: Replicas in question, by slot, `bool[W]`.
        may_hold: Whether it may be held (again).
        attempts: Replicas that have failed the request before.
        placing: Whether it is about where the request decodes.
    """
    slots = np.flatnonzero(allowed).tolist()
    outstanding = tuple(dispatcher.state.replicas[OUTSTANDING_REQUESTS, slots].tolist())
    if placing:
        decision = dispatcher.placing.decide(job, allowed)
    else:
        decision = dispatcher.decide(job, allowed=allowed, may_hold=may_hold, with_scores=True)
    end_ns = time.time_ns()
    loaded, scores = dispatcher.runtime.loaded, decision.scores
    return Explanation(
        action=_action(dispatcher, decision.action),
        by=decision.by,
        reason=decision.reason.value,
        proposed=None if decision.proposed is None else _action(dispatcher, decision.proposed),
        propensity=decision.propensity,
        policy=loaded.version if loaded else "none",
        candidates=tuple(dispatcher.names[slot] for slot in slots),
        outstanding=outstanding,
        scores=None if scores is None else tuple(scores[slots].tolist()),
        probabilities=None if scores is None else tuple(_softmax(scores)[slots].tolist()),
        attempts_before=attempts,
        model=job.model,
        slo_class=dispatcher.config.slo_classes[job.request.slo_class].name,
        prompt_tokens=float(job.prompt.tokens),
        predicted_output_tokens=float(job.request.predicted_output_tokens),
        end_ns=end_ns,
        duration_s=decision.duration_s,
        about="placement" if placing else "dispatch",
    )


def _action(dispatcher: Dispatcher, action: int) -> str:
    beyond = action - dispatcher.state.num_slots
    return dispatcher.names[action] if beyond < 0 else ("hold", "reject")[beyond]


def _softmax(scores: FloatArray) -> FloatArray:
    weights = np.exp(scores - scores.max())  # something is allowed, or no policy was asked
    return np.asarray(weights / weights.sum())
