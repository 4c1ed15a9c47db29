"""The tables of a replay, once, for terminal and HTML."""

from __future__ import annotations

import numpy as np

from servegym.replay.compare import Figure
from servegym.replay.counterfactual import LOGGED, Arrivals
from servegym.replay.drift import Effect
from servegym.replay.refit import HeldOut
from servegym.replay.result import Replayed
from servegym.replay.sentences import identifiability
from servegym.replay.terms import TERMS
from servegym.validate.tables import UNITS, TextTable

_NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}


def counts_table(result: Replayed) -> TextTable:
    """What became of every row of the log."""
    log, forced = result.log, result.forced
    counts = log.counts()
    compared = int(np.isfinite(result.observed.ttft_s).sum())
    left = {
        "requests": "in the log",
        "finished": "compared, but for those below",
        "not_streamed": "finished in one piece: only E2E is compared",
        "rejected": "never reached a replica: not simulated",
        "cancelled": "simulated as long as they lasted, not compared",
        "failed": "simulated as long as they lasted, not compared",
        "retried": "simulated from their last dispatch on",
        "held": "wait as they did",
        "following_by_session": "sent after an answer in their session",
        "following_by_prefix": "sent after an answer, as guessed from their prompts",
        "without_predecessor": "sent after an answer that is not in the log: come by themselves",
        "bad_rows": "left out: " + log.first_bad if log.first_bad else "left out",
    }
    rows = [(name.replace("_", " "), str(counts[name]), text) for name, text in left.items()]
    rows.append(("too large", str(forced.num_unfit), "beyond the KV cache of their replica"))
    fallback = f"; the fallback decided {log.num_fallbacks} of {log.num_decisions} times"
    return TextTable(
        f"{len(log.files)} file(s), {forced.span_s:.0f} s of dispatches",
        ("requests", "number", "what is done with them"),
        [row for row in rows if row[1] != "0" or row[0] == "requests"],
        f"{compared} requests have TTFT and TPOT to compare{fallback}.",
    )


def error_table(result: Replayed) -> TextTable:
    """Every latency of all requests, and means by replica and class."""
    rows = []
    for one in result.figures:
        if one.scope != "all" and one.statistic not in ("mean", "p99"):
            continue
        head, factor, digits = UNITS[one.metric]
        rows.append(
            (
                one.name or "all",
                f"{head}, {one.statistic}",
                f"{factor * one.observed:.{digits}f}",
                f"{factor * one.predicted:.{digits}f}",
                f"{100 * one.error:+.1f} %",
                f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}]",
                str(one.num_requests),
            )
        )
    notes = [*result.log.fleet.notes]
    if result.cached is not None:
        told, made = (f"{100 * share:.1f} %" for share in result.cached)
        notes.append(f"prompt tokens found cached: {told} as engines report, {made} simulated")
    return TextTable(
        "Logged dispatches, simulated: predicted against observed",
        ("where", "latency", "observed", "predicted", "error", "95 %", "requests"),
        rows,
        ". ".join(notes),
    )


def drift_table(result: Replayed) -> TextTable:
    """Factors of every stretch of every replica."""
    rows = []
    for replica in result.drift.replicas:
        for stretch in replica.stretches:
            span = f"{stretch.begin_s:.0f}-{stretch.end_s:.0f}"
            terms = [_cell(stretch.terms[term]) for term in TERMS]
            request = stretch.terms["request"]
            seconds = (
                f"{1e3 * request.value:+.1f} [{1e3 * request.low:.1f}, {1e3 * request.high:.1f}]"
            )
            rows.append((replica.name, span, _cell(stretch.decode), *terms, seconds))
    notes = sorted(
        {
            f"{replica.name}: {text}"
            for replica in result.drift.replicas
            for stretch in replica.stretches
            if (text := identifiability(stretch))
        }
    )
    return TextTable(
        "Time over what the cost model says, with 95 % intervals",
        ("replica", "s", "decode", *TERMS, "request, ms"),
        rows,
        f"* off by more than {100 * result.drift.tolerance:g} %, and surely so; ? not told by this "
        "log. decode is step and kv as a typical decode step has them. " + ". ".join(notes),
    )


def _cell(effect: Effect) -> str:
    mark = "*" if effect.drifted else "" if effect.known else "?"
    return f"{effect.value:.2f} [{effect.low:.2f}, {effect.high:.2f}]{mark}"


def counterfactual_table(result: Replayed) -> TextTable:
    """What other policies would have made of the arrivals."""
    rows: list[tuple[str, ...]] = []
    closed = result.arrivals.loop == "closed"
    known = simulation_error(result)
    doubt = 0.0 if known is None else max(abs(known.low), abs(known.high))
    for one in result.counterfactuals:
        cells = [
            f"{UNITS[metric][1] * one.statistics[metric, statistic]:.{UNITS[metric][2]}f}"
            if (metric, statistic) in one.statistics
            else "-"
            for metric, statistic in (
                ("ttft_s", "mean"),
                ("ttft_s", "p99"),
                ("tpot_s", "mean"),
                ("e2e_s", "mean"),
                ("e2e_s", "p99"),
            )
        ]
        ratio = f"{one.ratio.value:.3f} [{one.ratio.low:.3f}, {one.ratio.high:.3f}]"
        share = f"{100 * one.slo_attainment:.1f} %"
        if one.policy != LOGGED and abs(one.ratio.value - 1.0) < doubt:
            ratio += " ?"
        same = f"{100 * one.agreement:.0f} %"
        later = f"{float(one.shift_s.mean()):+.2f}"
        name = one.policy + (" (decided)" if one.decided else "")
        rows.append((name, *cells, ratio, share, same, *([later] if closed else [])))
    note = (
        "Counterfactual: everything here is simulated, with the costs as fitted; nothing of it was "
        "observed. Ratio: mean E2E over that of the logged decisions. "
        + _loop_note(result.arrivals)
        + _error_note(known)
    )
    if result.unknown_policies:
        note += (
            f" Not simulated: {', '.join(result.unknown_policies)}, known by name or checksum "
            "only: give the file with --policies."
        )
    return TextTable(
        "The same arrivals under policies (counterfactual)",
        (
            "policy",
            "TTFT mean, ms",
            "p99",
            "TPOT, ms",
            "E2E mean, s",
            "p99",
            "ratio",
            "in SLO",
            "same choice",
            *(["arrivals later, s"] if closed else []),
        ),
        rows,
        note,
    )


def simulation_error(result: Replayed) -> Figure | None:
    """Return the error of mean E2E where it can be seen: on the logged decisions, as fitted.

    A held-out part says more than the data of the fit, where the log was tested on one.
    """
    figures = result.corrected_figures if result.held_out is None else result.held_out.after
    found = [f for f in figures if (f.scope, f.metric, f.statistic) == ("all", "e2e_s", "mean")]
    return found[0] if found else None


def _error_note(known: Figure | None) -> str:
    if known is None:
        return " How wrong the simulation is cannot be seen from this log."
    return (
        f" Of the logged decisions, where it can be checked, the simulated mean E2E is off by "
        f"{100 * known.error:+.1f} % [{100 * known.low:+.1f}, {100 * known.high:+.1f}]; a ratio "
        "nearer to 1 than that (?) may be the simulator's doing. For decisions unlike the logged "
        "ones the error is not known."
    )


def _loop_note(arrivals: Arrivals) -> str:
    """Say who waits for whom."""
    table = arrivals.table
    if arrivals.loop == "open":
        return "Open loop: requests arrive as recorded, however slow the answers before them."
    note = (
        f"Closed loop: {table.num_waiting} of {len(table)} requests wait for the answer they "
        "followed, and arrive as long after it as recorded."
    )
    if table.num_cut:
        note += f" {table.num_cut} whose predecessor is not played arrive as recorded."
    return note


def held_out_table(result: HeldOut) -> TextTable:
    """Errors on the later part before and after the refit."""
    after = {_key(one): one for one in result.after}
    rows = []
    for one in result.before:
        new = after.get(_key(one))
        if new is None or (one.scope == "class") or one.statistic not in ("mean", "p50", "p99"):
            continue
        if one.scope != "all" and one.statistic != "mean":
            continue
        rows.append(
            (
                one.name or "all",
                f"{_NAMES[one.metric]}, {one.statistic}",
                f"{100 * one.error:+.1f} %",
                f"{100 * new.error:+.1f} %",
                f"[{100 * new.low:+.1f}, {100 * new.high:+.1f}]",
                str(one.num_requests),
            )
        )
    return TextTable(
        f"Refit on what had ended by {result.split_s:.0f} s, tested on what came after",
        ("where", "latency", "error before", "after", "95 %", "requests"),
        rows,
    )


def _key(one: Figure) -> tuple[str, str, str, str]:
    return one.scope, one.name, one.metric, one.statistic


def replay_tables(result: Replayed) -> list[TextTable]:
    """All of them, in the order they are read."""
    found = [counts_table(result), error_table(result), drift_table(result)]
    if result.held_out is not None:
        found.append(held_out_table(result.held_out))
    return [*found, counterfactual_table(result)]
