"""What the dispatcher reports of itself to Prometheus, whichever way in uses it."""

from __future__ import annotations

from servegym.serve.dispatcher import Dispatcher
from servegym.serve.monitoring.prometheus import Exposition


def add_dispatcher(page: Exposition, dispatcher: Dispatcher) -> None:
    """Write the decisions, the guards and the state of every replica onto a page."""
    runtime, state, now_s = dispatcher.runtime, dispatcher.state, dispatcher.clock()
    counters = runtime.counters
    page.counter(
        "servegym_decisions",
        "Decisions by who made them",
        [({"by": "policy"}, counters.num_policy), ({"by": "fallback"}, counters.num_fallback)],
    )
    page.counter(
        "servegym_decision_reasons",
        "Decisions by reason",
        [({"reason": reason.value}, count) for reason, count in counters.by_reason.items()],
    )
    page.counter(
        "servegym_fallback_agreements",
        "Decisions of the fallback that the policy, asked too, agreed with or not",
        [({"agreed": "yes"}, counters.num_agreed), ({"agreed": "no"}, counters.num_differed)],
    )
    page.counter(
        "servegym_features_out_of_range",
        "Decisions in which a feature was far from what training has shown",
        [({"feature": name}, count) for name, count in sorted(runtime.features_out.items())],
    )
    page.gauge(
        "servegym_policy_kept_out_decisions",
        "Decisions in a row in which the state kept the policy from being asked",
        runtime.silence.num_in_row,
    )
    page.gauge(
        "servegym_policy_never_decides",
        "1 if the fleet itself is too far from what the policy was trained on",
        float(runtime.never_decides() is not None),
    )
    page.counter(
        "servegym_policy_loads",
        "Policies put in place after the first, and policies that failed their checks",
        [({"result": "good"}, counters.num_reloads), ({"result": "bad"}, counters.num_refused)],
    )
    status = runtime.status()
    page.gauge(
        "servegym_policy_info",
        "The policy in place",
        1.0,
        policy=str(status["policy"] or ""),
        version=str(status["version"] or ""),
        fallback=str(status["fallback"]),
    )
    page.gauge(
        "servegym_shadow", "1 if the policy is only watched", float(runtime.mode == "shadow")
    )
    page.gauge("servegym_canary_fraction", "Share the policy decides", runtime.canary_fraction)
    page.gauge(
        "servegym_breaker_state",
        "0 closed, 1 open, 2 on trial",
        float(runtime.breaker.state(runtime.clock())),
    )
    page.counter("servegym_breaker_opened", "Times it opened", [({}, runtime.breaker.num_opened)])
    page.histogram("servegym_decision_seconds", "Time to decide", runtime.latency)
    named: dict[str, list[int]] = {}  # one that leaves may have the name of one that has come
    for slot in dispatcher.slots():
        named.setdefault(dispatcher.names[slot], []).append(slot)
    page.gauges(
        "servegym_replica_up",
        "1 if it takes requests",
        [({"replica": name}, float(any(map(state.is_up, slots)))) for name, slots in named.items()],
    )
    page.gauges(
        "servegym_replica_outstanding_requests",
        "Dispatched to it and not ended",
        [({"replica": name}, sum(map(state.outstanding, slots))) for name, slots in named.items()],
    )
    page.gauges(
        "servegym_replica_metrics_age_seconds",
        "Age of the engine's metrics",
        [
            ({"replica": name}, min(state.metrics_age_s(slot, now_s) for slot in slots))
            for name, slots in named.items()
        ],
    )
    page.gauge("servegym_held_requests", "On hold", state.num_held)
    page.gauge("servegym_arrival_rate_rps", "Moving average", state.arrival_rate_rps)
    if dispatcher.log is not None:
        page.counter(
            "servegym_log_rows",
            "Rows of the decision log",
            [
                ({"result": "written"}, dispatcher.log.num_written),
                ({"result": "dropped"}, dispatcher.log.num_dropped),
            ],
        )
        page.counter(
            "servegym_log_failed_writes",
            "Attempts to write the decision log that failed",
            [({}, dispatcher.log.num_failed)],
        )
