"""Drift in words: what is said of a replica, and of what a log does not tell."""

from __future__ import annotations

from servegym.replay.drift import Effect, ReplicaDrift, Stretch

#: Two terms whose estimates go together like this cannot be told apart.
_CORRELATED = -0.8


def sentence(replica: ReplicaDrift) -> str:
    """Say in one line how a replica compares with its cost model."""
    if not replica.stretches:
        return f"replica {replica.name}: too few requests to tell ({replica.num_requests})"
    parts = []
    for i, stretch in enumerate(replica.stretches):
        when = ""
        if len(replica.stretches) > 1:
            last = i + 1 == len(replica.stretches)
            when = f"from {stretch.begin_s:.0f} s on " if last else f"until {stretch.end_s:.0f} s "
            if not last and i > 0:
                when = f"from {stretch.begin_s:.0f} s to {stretch.end_s:.0f} s "
        parts.append(when + "; ".join(_phrases(stretch)))
    return f"replica {replica.name}: " + "; ".join(parts)


def _phrases(stretch: Stretch) -> list[str]:
    found = [_phrase("decode", stretch.decode), _phrase("prefill", stretch.prefill)]
    request = stretch.terms["request"]
    if request.drifted and request.known:
        found.append(
            f"{1e3 * request.value:+.1f} ms [{1e3 * request.low:.1f}, {1e3 * request.high:.1f}] "
            "a request outside the engine"
        )
    return found


def _phrase(what: str, effect: Effect) -> str:
    if not effect.known:
        return f"{what} cannot be told from this log ({effect.low:.2f}x to {effect.high:.2f}x)"
    if not effect.drifted:
        return f"{what} as expected"
    if effect.value > 1:
        ends = f"[{effect.low:.2f}, {effect.high:.2f}]"
        return f"{what} {effect.value:.2f}x {ends} slower than its cost model"
    ends = f"[{1 / effect.high:.2f}, {1 / effect.low:.2f}]"
    return f"{what} {1 / effect.value:.2f}x {ends} faster than its cost model"


def identifiability(stretch: Stretch) -> str:
    """Say which terms a log cannot tell apart, or ""."""
    step, kv = stretch.terms["step"], stretch.terms["kv"]
    if step.known and kv.known and stretch.correlation > _CORRELATED:
        return ""
    if stretch.correlation <= _CORRELATED:
        return (
            f"step and kv cannot be told apart (correlation {stretch.correlation:.2f}): "
            "only decode, which has both, is known"
        )
    open_terms = [name for name, one in stretch.terms.items() if not one.known]
    return f"the log says little of {' and '.join(open_terms)}" if open_terms else ""
